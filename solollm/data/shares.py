"""Which documents of which part come into a mix, how often, and in what order: arrays of hashes.

Nothing here reads a document. Equal inputs give equal results, however the parts are listed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from solollm.errors import ConfigError

# A document: the halves of its digest, its part and its number there, its tokens with bos and eos,
# its bytes of text.
ENTRY = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("part", "<u4"), ("number", "<u8"), ("tokens", "<u4"),
     ("text", "<u4"), ("validation", "?")]
)  # fmt: skip
_GOLDEN = 0x9E3779B97F4A7C15


class Equals(NamedTuple):
    """Documents that are not the first of their kind: held out by another part, or in it too."""

    held_out: int
    equal: int


def first_of_equals(documents: np.ndarray) -> np.ndarray:
    """bool: the first of each digest, in an order that has equal ones side by side."""
    is_first = np.ones(len(documents), bool)
    is_first[1:] = (documents["high"][1:] != documents["high"][:-1]) | (
        documents["low"][1:] != documents["low"][:-1]
    )
    return is_first


def count_equals(documents: np.ndarray, is_first: np.ndarray) -> Equals:
    first = documents[np.maximum.accumulate(np.where(is_first, np.arange(len(documents)), 0))]
    later = ~is_first
    held_out = later & first["validation"] & ~documents["validation"]
    return Equals(int(held_out.sum()), int((later & ~held_out).sum()))


def draw_copies(train: np.ndarray, part: int, wanted: float) -> np.ndarray:
    """The copies of a part's documents that come to `wanted` tokens, each as ("document": its place
    in `train`, "order": where it comes). Whole passes, and of the rest the documents with the
    lowest hashes, to where their tokens are nearest to it.

    Raises:
        ConfigError: nearest is none at all.
    """
    (own,) = np.nonzero(train["part"] == part)
    sizes = train["tokens"][own].astype(np.int64)
    whole, left = divmod(wanted, int(sizes.sum()))
    drawn = np.argsort(_scrambled(train["low"][own]), kind="stable")
    ends = np.concatenate([[0], np.cumsum(sizes[drawn])])
    some = own[drawn[: int(np.abs(ends - left).argmin())]]
    rounds = [own] * int(whole) + [some]
    if not sum(map(len, rounds)):
        raise ConfigError(
            f"a share of {wanted:,.0f} tokens is less than half a document of one of the corpora",
            fix="give more --tokens, or that corpus a larger weight",
        )
    found = np.empty(sum(map(len, rounds)), [("document", np.int64), ("order", np.uint64)])
    at = 0
    for number, documents in enumerate(rounds):
        stop = at + len(documents)
        found["document"][at:stop] = documents
        shift = np.uint64(_GOLDEN * number % 2**64)
        found["order"][at:stop] = _scrambled(train["high"][documents] + shift)
        at = stop
    return found


def _scrambled(hashes: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: another order of the same hashes."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: np.ndarray = hashes ^ (hashes >> np.uint64(31))
    return scrambled
