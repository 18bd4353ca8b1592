"""Encoding a corpus many times faster than plain `tokenizers`, to the same ids.

Two facts make it fast. Text repeats its words, so a word's ids are asked of the plain model once
and remembered. And Python's own `re` splits text faster than the plain pre-tokenizer does, once
its letters, digits and spaces are written out as character classes; those classes are learned
from the plain library itself, so both agree on every code point, whichever Unicode versions the
two were built with. A self-check decides whether the fast way may be used.

The split, `Digits` before GPT-2's expression, is one pattern here. A digit ends what is before
it: a run of spaces is kept whole in front of a digit (and at the end of a text), while in front
of anything else its last space belongs to what follows.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from solollm.tokenizer_format import byte_alphabet, fixed_pre_tokenizer

_CHUNK_CHARS = 1 << 20  # words of this much text are listed at once
_MAX_WORDS = 1 << 18  # remembered words: about 60 MB
_MAX_WORD_CHARS = 64
_SAFE_CUT = re.compile(r"\S(?=[ \n])")  # between these two, no piece crosses

_ASCII_WORDS = re.compile(
    r"[A-Za-z]+| (?:[A-Za-z]+|[^\t-\r A-Za-z0-9]+)|'(?:[sdmt]|ll|ve|re)|[^\t-\r A-Za-z0-9]+"
    r"|[0-9]|[\t-\r ]+(?![^\t-\r 0-9])|[\t-\r ]"
)
_TRICKY_TEXTS = (
    "it's we'll they've I'm you'd isn't we're 's'S 'LL o'clock x'sy 5's' ''d",
    "a  b   c\td \t e\n\n\nf\r\n  g \n 1  2\n3   \n\n 4\t5 ",
    "1234 5,678.90 x1y22z333 1st 0x1F 3.14e-10 $5 %6 7% (8) _9_ __10__",
    "   leading   and trailing   ",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f\x80\x85\xa0\xad end\x0b\x0c\x1c 1\x1f2",
    "naïve café ÀÉÎ ß ŉ ǅ ʰ ª º µ x²³¹ ½¾ Ⅷ ① ㊿ ٣٤ ४५ \U0001d7d8\U0001d7d9 五六 \u3007 𐄇",
    "日本語、テスト。한국어 ไทย हिन्दी עִבְרִית العَرَبِيَّة e\u0301 o\u0308\u0323 ﷽",
    "🙂👩\u200d👩\u200d👧 🇫🇷1️⃣ \u2028\u2029\u202f\u3000x\u3000 1\u2003 2\u180e3 \ufeff\ufffd\uffff",
    "𐐷\U0001d4b3 𠀀𪛖 🂡x\U0001d4b31 \U0001d4b3's a\U0001d4b3b \U0010ffff \U000e0001 \U000f0000y",
    "def f(self, *args):\n    return [x**2 for x in range(10)]  # <|end|>\n\n\n\tpass\n",
)


class FastEncoder:
    """Text to ids for one tokenizer with SoloLLM's pre-tokenizer. Safe to share by threads."""

    def __init__(self, plain: Any) -> None:
        self._words = _WordIds(plain.model)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32 [tokens].

        Raises:
            UnicodeEncodeError: the text holds a lone surrogate.
        """
        ids_of = self._words.__getitem__
        parts = [b"".join(map(ids_of, words)) for words in words_of(text)]
        return np.frombuffer(bytearray().join(parts), dtype=np.uint32)


class _WordIds(dict[str, bytes]):
    """Word -> its ids as the bytes of uint32, asked of the plain model at first sight."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self._letters = byte_alphabet()

    def __missing__(self, word: str) -> bytes:
        letters = word.encode().decode("latin-1").translate(self._letters)
        ids = array("I", [token.id for token in self._model.tokenize(letters)]).tobytes()
        if len(word) <= _MAX_WORD_CHARS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def words_of(text: str) -> Iterator[list[str]]:
    """The pre-tokenizer's pieces of `text`, in lists that together hold all of them in order."""
    pattern = _ASCII_WORDS if text.isascii() else _unicode_words()
    start = 0
    while start < len(text):
        cut = _SAFE_CUT.search(text, start + _CHUNK_CHARS)
        end = cut.end() if cut else len(text)
        yield pattern.findall(text, start, end)
        start = end


def plain_words_of(text: str) -> Iterator[list[str]]:
    """`words_of` by the plain pre-tokenizer: the reference, and the way out where they differ."""
    yield [text[start:end] for _, (start, end) in fixed_pre_tokenizer().pre_tokenize_str(text)]


@cache
def is_faithful() -> bool:
    """Whether `words_of` splits as the plain pre-tokenizer does, on texts chosen to tell."""
    return all(
        [word for words in words_of(text) for word in words] == next(plain_words_of(text))
        for text in _TRICKY_TEXTS
    )


@cache
def _unicode_words() -> re.Pattern[str]:
    """The pattern of `_ASCII_WORDS` for any text.

    Python tests ranges beyond U+FFFF one after the other, so they stand behind a guard. No letter
    is assigned above plane 3, no number above plane 1 and no space above plane 0.
    """
    from tokenizers import Regex, pre_tokenizers

    bmp = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000))))
    plane1, planes23 = (
        "".join(map(chr, codes)) for codes in (range(0x10000, 0x20000), range(0x20000, 0x40000))
    )
    is_letter = pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")
    is_number = pre_tokenizers.Digits(individual_digits=False)
    letter, letter2 = _members(is_letter, bmp), _members(is_letter, plane1 + planes23)
    number, number2 = _members(is_number, bmp), _members(is_number, plane1)
    space = _members(pre_tokenizers.Split(Regex(r"\s+"), "isolated"), bmp)
    far = "[\U00010000-\U0010ffff]"
    letters = rf"(?:[{letter}]++|(?={far})[{letter2}])++"
    near_other = rf"[^{space}{letter}{number}\U00010000-\U0010ffff]"
    others = rf"(?:{near_other}++|(?={far})[^{letter2}{number2}])++"
    digit = rf"(?:[{number}]|(?={far})[{number2}])"
    return re.compile(
        rf"{letters}| (?:{letters}|{others})|'(?:[sdmt]|ll|ve|re)|{others}"
        rf"|{digit}|[{space}]+(?=[{space}]|{digit}|\Z)|[{space}]"
    )


def _members(splitter: Any, characters: str) -> str:
    """The characters that `splitter` isolates, as the inside of a regular character class."""
    members: list[str] = []
    for start in range(0, len(characters), 4096):  # the library is slower on long texts
        part = "\x00" + characters[start : start + 4096]
        # Isolated runs alternate with what lies between them, and "\x00" is never isolated.
        runs = [piece for piece, _ in splitter.pre_tokenize_str(part)][1::2]
        members += [f"{re.escape(run[0])}-{re.escape(run[-1])}" for run in runs]
    return "".join(members)
