"""Which documents a mixture takes, how often, and in what order: arrays in, arrays out.

All of it follows from the documents' digests and lengths and from the shares asked for; where they
lie plays no part. The files are `solollm.data.mixing`'s concern.

A table [n] of `DOCUMENT` describes n documents in 43 bytes each; no token of theirs is held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from solollm.data.permutation import mixed_bits

# The digest of the tokens; the number of the corpus, of its split, and the first token there.
DOCUMENT = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("part", "<u2"), ("is_train", "u1"), ("start", "<u8"),
     ("tokens", "<u8"), ("text_bytes", "<u8")]
)  # fmt: skip
DIGEST_BYTES = 16
_LOTS, _PLACES = np.uint64(0x6C6F7473), np.uint64(0x706C61636573)  # keys: two unrelated hashes


class Sifted(NamedTuple):
    """Four kinds of documents, each in the order of its digests. `train` may hold one several
    times: as often as the corpus that it counts for does."""

    train: np.ndarray
    validation: np.ndarray
    leaked: np.ndarray
    num_duplicates: int


def digest_of(tokens: memoryview) -> bytes:
    """16 bytes that stand for a document; `tokens` are its ids as little-endian int32."""
    return hashlib.blake2b(tokens, digest_size=DIGEST_BYTES).digest()


def sift(found: np.ndarray) -> Sifted:
    """What counts of all documents found. What any corpus holds out is `validation`, once; equal
    training documents are `leaked`. Of equal documents in several corpora, those of the lowest
    part count, the others are duplicates."""
    order = np.lexsort((found["part"], found["is_train"], found["low"], found["high"]))
    found = found[order]
    first = first_of_equals(found)
    is_train = found["is_train"] == 1
    is_held_out = ~is_train[first]
    is_kept_out = is_held_out & (first == np.arange(found.size))
    is_leaked = is_held_out & is_train
    is_own = ~is_held_out & (found["part"] == found["part"][first])
    counted = is_kept_out | is_leaked | is_own
    return Sifted(
        found[is_own], found[is_kept_out], found[is_leaked], found.size - int(counted.sum())
    )


def copies_of(documents: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """int64 [documents]: how often each is taken, so that part p gives `wanted[p]` tokens.

    Every document of a part as many whole times as go into it; for the rest once more those with
    the lowest hash, as many as come nearest. A part gives at least one document.
    """
    copies = np.zeros(documents.size, np.int64)
    occurrence = np.arange(documents.size) - first_of_equals(documents)
    lots = _hashed(documents["high"], documents["low"], occurrence, _LOTS)
    for part, tokens in enumerate(wanted):
        own = np.flatnonzero(documents["part"] == part)
        own = own[np.argsort(lots[own], kind="stable")]
        reached = np.cumsum(documents["tokens"][own].astype(np.int64))
        passes, rest = divmod(tokens, int(reached[-1]))
        copies[own] = passes
        copies[own[: _nearest(reached, rest, least=0 if passes else 1)]] += 1
    return copies


def arranged(documents: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """int64 [sum of copies]: the numbers of the documents in the order they are written in.

    By a hash of the digest and of the number of the copy. Of n copies each falls into its own n-th
    of the whole, so that two are neighbours only by a rare chance, or where documents are few.
    """
    numbers = np.repeat(np.arange(documents.size), copies)
    first = first_of_equals(documents)[numbers]
    places = np.arange(numbers.size)
    begins = np.ones(numbers.size, bool)
    begins[1:] = first[1:] != first[:-1]
    copy = places - np.maximum.accumulate(np.where(begins, places, 0))
    count = np.diff(np.append(np.flatnonzero(begins), numbers.size))
    width = np.uint64(2**64 - 1) // np.repeat(count, count).astype(np.uint64)
    high, low = documents["high"][numbers], documents["low"][numbers]
    key = copy.astype(np.uint64) * width + _hashed(high, low, copy, _PLACES) % width
    ordered: np.ndarray = numbers[np.argsort(key, kind="stable")]
    return ordered


def first_of_equals(documents: np.ndarray) -> np.ndarray:
    """int64 [n]: for each document of a table in the order of digests, the first equal one."""
    high, low = documents["high"], documents["low"]
    places = np.arange(documents.size)
    is_equal = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    places[1:][is_equal] = 0
    first: np.ndarray = np.maximum.accumulate(places)
    return first


def _hashed(high: np.ndarray, low: np.ndarray, number: np.ndarray, key: np.uint64) -> np.ndarray:
    """uint64 [n] of digests and a number each."""
    values = mixed_bits(mixed_bits(high ^ key) ^ low)
    return mixed_bits(values + number.astype(np.uint64))


def _nearest(reached: np.ndarray, wanted: int, *, least: int) -> int:
    """How many items come nearest to `wanted`, `reached[i]` being the sum of the first i + 1."""
    count = int(np.searchsorted(reached, wanted, side="right"))
    if count < reached.size:
        below = wanted - (int(reached[count - 1]) if count else 0)
        count += int(reached[count]) - wanted < below
    return max(count, least)
