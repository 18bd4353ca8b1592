"""The texts that are most like some given ones: a domain's out of a crawl.

A text is scored by how much likelier its words and pairs of words are in the given texts than in
all texts that are to be chosen from, on average over them (Moore and Lewis 2010, ACL, with the
hashed features of Xie et al. 2023, arXiv:2302.03169). The highest scores stay, up to a share of the
text. Counts of the given texts are smoothed by those of all texts, so that a word which neither
knows says little, and a few given texts say less than many.

Memory holds 3 MB, and some 100 bytes per text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solollm.data.cleaning import normalised_where_sound
from solollm.data.items import Document, Limits
from solollm.data.shingles import Runs, split_words
from solollm.data.sources import check_sources, read_source
from solollm.errors import ConfigError

UNLIKE_NAME = "unlike.jsonl"
_BITS = 17  # of a feature: words in one half of the table, pairs in the other
_PRIOR = 2.0**14  # features of all texts that are added to those of the given ones


@dataclass(frozen=True)
class Like:
    """Keep the texts that are most like those of `sources`, up to `share` of the text."""

    sources: Sequence[str]
    share: float = 0.5

    def __post_init__(self) -> None:
        check_sources([str(source) for source in self.sources])
        if not 0 < self.share < 1:
            raise ConfigError(
                f"the share of text to keep is {self.share:g}, not between 0 and 1",
                fix="0.3 keeps the 30% that are most like the given texts",
            )

    def counts(self) -> Counts:
        """Of the given texts. Raises ConfigError if they hold no word."""
        wanted = Counts()
        for source in self.sources:
            for item in read_source(str(source), Limits()):
                if isinstance(item, Document):
                    wanted.add(normalised_where_sound(item.text))
        if not wanted.total:
            raise ConfigError(
                f"{', '.join(map(str, self.sources))} holds no text",
                fix="name texts of the kind that is wanted",
            )
        return wanted


class Counts:
    """How often each word and pair of words stands in texts."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << _BITS, np.int64)
        self._pending: list[np.ndarray] = []
        self._num_pending = 0

    def add(self, text: str) -> None:
        self._pending.append(features(text))
        self._num_pending += len(self._pending[-1])
        if self._num_pending > 1 << _BITS:
            self._settle()

    def beside(self, everything: Counts) -> np.ndarray:
        """float64 [features]: the logarithm of how much likelier each is here than in all texts."""
        counts = everything._settle() + 1.0 / (1 << _BITS)
        base, own = counts / counts.sum(), self._settle()
        here = (own + _PRIOR * base) / (own.sum() + _PRIOR)
        ratios: np.ndarray = np.log(here / base)
        return ratios

    @property
    def total(self) -> int:
        return int(self._settle().sum())

    def _settle(self) -> np.ndarray:
        found = np.concatenate([np.empty(0, np.int64), *self._pending])
        self._counts += np.bincount(found, minlength=1 << _BITS)
        self._pending, self._num_pending = [], 0
        return self._counts


def features(text: str) -> np.ndarray:
    """int64 [words + pairs]: their places in a table of 2^17."""
    hashes = split_words(text).hashes
    half = 1 << (_BITS - 1)
    places = (hashes >> np.uint64(65 - _BITS), Runs(hashes).of(2) >> np.uint64(65 - _BITS))
    found: np.ndarray = np.concatenate([places[0], places[1] + np.uint64(half)]).astype(np.int64)
    return found


def score(text: str, ratios: np.ndarray) -> float:
    """The mean of the ratios of a text's words and pairs, in nats; their lowest for no words."""
    found = features(text)
    return float(ratios[found].mean() if len(found) else ratios.min())


def choose(scores: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """bool: which texts stay: the highest scores, up to `share` of the sum of the sizes; at least
    one. Of equal scores the first."""
    order = np.argsort(-scores, kind="stable")
    stays = np.zeros(len(scores), bool)
    stays[order[np.cumsum(sizes[order]) <= share * sizes.sum()]] = True
    stays[order[:1]] = True
    return stays
