"""What a text is made of, for comparing texts: the hashes of its words, and of runs of them.

A word is a run of letters and digits, in lower case; an ideograph, kana or other letter of a script
that is written without spaces is a word by itself. Punctuation and blanks do not count. Equal texts
give equal hashes on every machine. Source of the shape: Lee et al. 2022, arXiv:2107.06499.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from solollm.data.permutation import mixed_bits

WORDS = 5  # of a shingle
_BLOCK = 1 << 16  # characters hashed at once: powers of the base are tabled up to there
_BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
_STEP = np.uint64(0xBF58476D1CE4E5B9)  # from word to word of a shingle
_UNBASE = np.uint64(pow(int(_BASE), -1, 2**64))
_RUN, _SINGLE = 1, 2
# First code points of blocks whose letters are words: Thai, Lao, Tibetan, Burmese, Khmer; kana,
# bopomofo, ideographs (and their extensions). Hangul is written with spaces.
_UNSPACED = (
    (0x0E00, 0x1000), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3130), (0x31A0, 0x31C0),
    (0x31F0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x323B0),
)  # fmt: skip


class Words(NamedTuple):
    """The words of a text in order: hashes uint64 [words], lengths in characters int64 [words]."""

    hashes: np.ndarray
    lengths: np.ndarray


class Runs:
    """The hashes of every run of words of a text, of whatever width.

    A run's is a polynomial over its words' hashes, so that one pass over a text serves all widths.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        powers = np.full(len(hashes), _BASE, np.uint64)
        powers[:1] = 1
        self._sums = np.zeros(len(hashes) + 1, np.uint64)
        np.cumsum(hashes * np.multiply.accumulate(powers), out=self._sums[1:])
        powers[1:] = _UNBASE
        self._unpowers = np.multiply.accumulate(powers)

    def of(self, width: int) -> np.ndarray:
        """uint64 [words - width + 1]: each run of `width` words, by its first one."""
        count = max(0, len(self._unpowers) - width + 1)
        found: np.ndarray = (self._sums[width:] - self._sums[:count]) * self._unpowers[:count]
        return found


def shingles(text: str) -> np.ndarray:
    """The distinct hashes, uint64 ascending, of all runs of five words of a text; of all its words
    in one where it has fewer. Empty for a text without words."""
    words = split_words(text).hashes
    if not len(words):
        return words
    width = min(WORDS, len(words))
    count = len(words) - width + 1
    total = np.zeros(count, np.uint64)
    for place in range(width):
        total = total * _STEP + words[place : place + count]
    return np.unique(mixed_bits(total))


def split_words(text: str) -> Words:
    """The words of a text."""
    codes = np.frombuffer(text.lower().encode("utf-32-le", "replace"), "<u4")
    kinds = _kinds()[codes]
    is_run = kinds == _RUN
    begins = is_run.copy()
    begins[1:] &= ~is_run[:-1]
    begins |= kinds == _SINGLE
    (starts,) = np.nonzero(begins)
    if not len(starts):
        return Words(np.empty(0, np.uint64), np.empty(0, np.int64))
    values = np.where(kinds > 0, codes.astype(np.uint64) + np.uint64(1), np.uint64(0))
    # A polynomial over each word: sums of values times powers that count from the word's start.
    ordinal = np.cumsum(begins) - 1
    within = np.arange(len(codes)) - starts[np.maximum(ordinal, 0)]
    powers = _powers()[np.clip(within, 0, _BLOCK - 1)]
    return Words(
        mixed_bits(np.add.reduceat(values * powers, starts)),
        np.add.reduceat((kinds > 0).astype(np.int64), starts),
    )


@lru_cache(1)
def _powers() -> np.ndarray:
    powers = np.full(_BLOCK, _BASE, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


@lru_cache(1)
def _kinds() -> np.ndarray:
    """uint8 [all code points]: 0 for what parts words, 1 for a letter of one, 2 for a whole one."""
    table = np.zeros(0x110000, np.uint8)
    for code_point in range(0x323B0):  # none is assigned above, but tags and private use
        if unicodedata.category(chr(code_point))[0] in "LNM":
            table[code_point] = _RUN
    for first, last in _UNSPACED:
        part = table[first:last]
        part[part == _RUN] = _SINGLE
    return table
