"""Ends an answer that goes round in circles, as small models do.

Two signs: the text repeats itself exactly with some period (judged at every sixteenth character),
or the same line comes back over and over, its number in a list aside.
"""

from __future__ import annotations

import re
from collections import deque

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from solollm.guard.notices import Notices
from solollm.serving.text_filter import TextFilter

_MAX_PERIOD, _BLOCK = 400, 16  # characters
_MIN_REPEATS, _MIN_CHARS = 5, 240  # both: a rule of dashes or a row of zeros is no loop yet
_LINE_REPEATS, _LINES_SEEN = 6, 8
_MIN_LINE_CHARS, _MIN_LINE_WORDS = 20, 4
_NUMBERING = re.compile(r"^\s{0,8}(?:(?:step|day|chapter)? ?\d{1,4}[.):]|[-*+])\s*", re.IGNORECASE)


class LoopStop(TextFilter):
    """Lets everything through up to where a loop is certain."""

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self._codes = np.full(_MAX_PERIOD + _BLOCK, -1, np.int32)  # what came before, and a block
        # Views into it, made once: making them takes longer than what is done with them.
        self._back = sliding_window_view(self._codes, _MAX_PERIOD)[:_BLOCK]  # [_BLOCK, period]
        self._new = self._codes[_MAX_PERIOD:, None]  # [_BLOCK, 1]
        self._num_new = 0  # characters of the block that are there
        self._matched = np.zeros(_MAX_PERIOD, np.int64)  # per period: characters as so far back
        periods = np.arange(_MAX_PERIOD, 0, -1)
        self._needed = np.maximum((_MIN_REPEATS - 1) * periods, _MIN_CHARS - periods)
        self._line = ""
        self._lines: deque[str] = deque(maxlen=_LINES_SEEN)

    def push(self, text: str) -> str:
        at = 0
        while at < len(text):
            piece = text[at : at + _BLOCK - self._num_new]
            end = self._end_of_lines(piece)
            if end is None and self._is_periodic(piece):
                end = len(piece)
            if end is not None:
                self._notices.note("repetition", "loop", "block")
                self.stopped = "content_filter"
                return text[: at + end]
            at += len(piece)
        return text

    def finish(self) -> str:
        return ""

    def _is_periodic(self, piece: str) -> bool:
        """Take in a block's next characters; judge once it is whole."""
        start = _MAX_PERIOD + self._num_new
        self._codes[start : start + len(piece)] = [ord(char) for char in piece]
        self._num_new += len(piece)
        if self._num_new < _BLOCK:
            return False
        self._num_new = 0
        is_equal = self._back == self._new  # [_BLOCK, period]
        since_unequal = np.argmin(is_equal[::-1], axis=0)
        is_whole = is_equal.all(axis=0)
        self._matched = np.where(is_whole, self._matched + _BLOCK, since_unequal)
        self._codes[:_MAX_PERIOD] = self._codes[_BLOCK:].copy()
        return bool((self._matched >= self._needed).any())

    def _end_of_lines(self, piece: str) -> int | None:
        """Where a line ends in a piece that has come too often, if one does."""
        at = 0
        while (end := piece.find("\n", at)) >= 0:
            self._line += piece[at:end]
            at = end + 1
            if self._is_old_line():
                return at
        self._line += piece[at:]
        return None

    def _is_old_line(self) -> bool:
        line = _NUMBERING.sub("", self._line[:500]).strip().casefold()
        self._line = ""
        if len(line) < _MIN_LINE_CHARS or len(re.findall(r"[^\W\d_]{2,}", line)) < _MIN_LINE_WORDS:
            return False
        self._lines.append(line)
        return self._lines.count(line) >= _LINE_REPEATS
