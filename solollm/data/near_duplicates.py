"""Texts that are nearly another one out: reprints, new versions, pages around the same article.

Two texts are near duplicates if of all runs of five words in either (`shingles`) a given share is
in both (Jaccard). Candidates come from MinHash signatures in bands (Broder 1997; Leskovec et al.
2014, chapter 3); every pair is then compared itself, so that no text is lost to an estimate. Texts
are taken in their corpus's order, which depends on content alone, and one is kept unless it is
like one that was kept before: of a chain of versions the ends may both stay.

Memory holds 16 bytes per text, 8 per pair of candidates, and what `texts` holds; the keys of the
bands lie on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from solollm.data.shingles import shingles
from solollm.durable import create_file

# A pair that shares s of its shingles meets in a band with 1 - (1 - s^5)^25: 0.9999 for 0.8, 0.55
# for 0.5.
BANDS, ROWS = 25, 5
LEAST_SHINGLES = 4  # 8 words; shorter texts are alike by chance
_COMPARED = 4  # of a bucket: how many of its first texts, and of those just before, a text meets
_BLOCK = 4096  # shingles hashed at once
_REMEMBERED = 64  # texts whose shingles are kept
_WRITE_BYTES = 1 << 18


class Texts(Protocol):
    """Texts by their number."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> str: ...


class NearDuplicate(NamedTuple):
    """A text to leave out, the kept one that it is like, and the share of shingles in both."""

    text: int
    like: int
    similarity: float


def find_near_duplicates(
    texts: Texts,
    threshold: float,
    folder: Path,
    *,
    tell: Callable[[int], None] = lambda _: None,
) -> list[NearDuplicate]:
    """The texts that are at least `threshold` (0 to 1) like one before them that stays.

    Args:
        texts: read one at a time, more than once.
        folder: exists; the keys are put there and stay.
        tell: is given how many texts have been read for the first time.

    Raises:
        StorageError: the disk is full or failing.
    """
    assert len(texts) < 2**32, "two numbers are held in 64 bits"
    paths = [folder / f"band-{band:02d}.bin" for band in range(BANDS)]
    _write_keys(texts, paths, tell)
    pairs = np.empty(0, np.uint64)
    for path in paths:
        met = [_pairs(bucket) for bucket in _buckets(np.fromfile(path, "<u8"))]
        pairs = np.unique(np.concatenate([pairs, *met]))
    known = lru_cache(_REMEMBERED)(lambda number: shingles(texts[number]))
    found: dict[int, NearDuplicate] = {}
    for pair in map(int, pairs):  # by the later text, then by the earlier one
        number, other = pair >> 32, pair & 0xFFFFFFFF
        if number in found or other in found:
            continue
        similarity = jaccard(known(number), known(other))
        if similarity >= threshold:
            found[number] = NearDuplicate(number, other, similarity)
    return list(found.values())


def signature(hashes: np.ndarray) -> np.ndarray:
    """MinHash of a text's shingles: uint32 [BANDS * ROWS], each equal for two texts with the
    probability of the share that is in both."""
    factors, lowest = _factors()[:, None], np.full(BANDS * ROWS, 2**32 - 1, np.uint32)
    high = (hashes >> np.uint64(32)).astype(np.uint32)
    for start in range(0, len(high), _BLOCK):
        permuted = high[start : start + _BLOCK] * factors
        permuted ^= permuted >> np.uint32(15)
        lowest = np.minimum(lowest, permuted.min(1))
    return lowest


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """The share of two sets, each ascending, that is in both."""
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def _write_keys(texts: Texts, paths: list[Path], tell: Callable[[int], None]) -> None:
    """One key per text and band; 0 for texts that are not compared."""
    with ExitStack() as stack:
        files = [stack.enter_context(create_file(path)) for path in paths]
        pending: list[np.ndarray] = []
        for number in range(len(texts)):
            pending.append(_keys(texts[number]))
            if len(pending) * 8 >= _WRITE_BYTES or number == len(texts) - 1:
                for file, keys in zip(files, np.stack(pending, axis=1), strict=True):
                    file.write(keys.astype("<u8").tobytes())
                pending = []
            tell(number + 1)


def _keys(text: str) -> np.ndarray:
    """uint64 [BANDS]."""
    hashes = shingles(text)
    if len(hashes) < LEAST_SHINGLES:
        return np.zeros(BANDS, np.uint64)
    rows = signature(hashes).astype(np.uint64).reshape(BANDS, ROWS)
    keys = np.zeros(BANDS, np.uint64)
    for row in range(ROWS):
        keys = (keys ^ rows[:, row]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return np.maximum(keys, np.uint64(1))


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The texts that share a key, ascending, of every key that several have."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    (starts,) = np.nonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    sizes = np.diff(np.append(starts, len(ordered)))
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        if ordered[start]:
            yield order[start : start + size]


def _pairs(bucket: np.ndarray) -> np.ndarray:
    """Who of a bucket is compared with whom: uint64, the later text's number above the earlier's.
    Not all with all, which for a thousand copies of a licence would be a million."""
    numbers = bucket.astype(np.uint64)
    earlier: list[np.ndarray] = []
    later: list[np.ndarray] = []
    for place in range(1, min(_COMPARED, len(numbers) - 1) + 1):
        earlier += [numbers[:-place], np.full(len(numbers) - place, numbers[place - 1])]
        later += [numbers[place:], numbers[place:]]
    pairs: np.ndarray = (np.concatenate(later) << np.uint64(32)) | np.concatenate(earlier)
    return pairs


@lru_cache(1)
def _factors() -> np.ndarray:
    """Odd: a product with one is a permutation of the 32-bit numbers."""
    drawn = np.random.Generator(np.random.PCG64(0)).integers(0, 2**31, BANDS * ROWS)
    return (drawn * 2 + 1).astype(np.uint32)
