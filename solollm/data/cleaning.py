"""One spelling for every text: NFC, newline ends, no control characters; or the reason why not."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

import numpy as np

_LINE_ENDS = ("\r\n", "\r", "\x0b", "\x0c", "\x85")
_ASCII_CONTROLS = bytes(c for c in (*range(32), 127) if c not in b"\t\n")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # category Cc but tab and newline
_MAX_MARKS = 30  # Unicode's Stream-Safe Text Format (UAX #15) allows as many in a row


class Defect(Exception):
    """A text that cannot become a document; its message is the reason, a fixed phrase."""


def normalise(text: str) -> str:
    """The text in NFC with \\n for every line end and no other control characters but tabs.

    Idempotent.

    Raises:
        Defect: a lone surrogate, which UTF-8 cannot hold; or a run of combining marks, which takes
            time quadratic in its length to normalise: minutes for a hundred thousand.
    """
    text = text.lstrip("\ufeff")
    for line_end in _LINE_ENDS:
        if line_end in text:
            text = text.replace(line_end, "\n")
    if text.isascii():
        return text.encode().translate(None, _ASCII_CONTROLS).decode()
    text = _CONTROLS.sub("", text)
    _refuse_defects(text)
    return unicodedata.normalize("NFC", text)


def normalised_where_sound(text: str) -> str:
    """`normalise`, or the text as it is where that has a `Defect`: to compare with corpora, whose
    texts are normalised."""
    try:
        return normalise(text)
    except Defect:
        return text


def _refuse_defects(text: str) -> None:
    try:
        code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    except UnicodeEncodeError as error:
        raise Defect("lone surrogate") from error
    places = np.flatnonzero(_combining()[code_points])
    if (places[_MAX_MARKS:] - places[:-_MAX_MARKS] == _MAX_MARKS).any():
        raise Defect("run of combining marks")


@lru_cache(1)
def _combining() -> np.ndarray:
    """bool [all code points]: is it a combining mark?"""
    table = np.zeros(0x110000, bool)
    for code_point in range(0x1F000):  # none is assigned above
        table[code_point] = unicodedata.combining(chr(code_point)) != 0
    return table
