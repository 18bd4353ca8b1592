"""How much of its training text a model continues word for word, beside text it has not seen.

Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models" (ICLR): the model is
given a passage's first tokens and decodes greedily; the passage is reproduced if all that follows
is equal. Text that is common, as licences and idioms are, is continued without having been
memorised: how much of that there is, the held-out passages say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from solollm.backend import Engine, Request
from solollm.data.permutation import Permutation
from solollm.data.shards import Split, SplitReader
from solollm.evaluation.harness import confidence_interval
from solollm.generation import feed

_LOOKED_AT = 100  # places per passage that is wanted: of short documents most hold none


@dataclass(frozen=True)
class Reproduction:
    """`matching`: of each passage, how many tokens of the continuation are right before the first
    wrong one."""

    split: Split
    prefix_tokens: int
    continuation_tokens: int
    matching: tuple[int, ...]

    @property
    def share(self) -> float:
        return fmean(self._is_whole)

    @property
    def interval(self) -> tuple[float, float]:
        """95%, of the share."""
        return confidence_interval(self._is_whole)

    @property
    def mean_matching(self) -> float:
        return fmean(self.matching)

    @property
    def mean_matching_interval(self) -> tuple[float, float]:
        return confidence_interval([float(length) for length in self.matching])

    @property
    def _is_whole(self) -> list[float]:
        return [float(length == self.continuation_tokens) for length in self.matching]

    def document(self) -> dict[str, Any]:
        return {
            **vars(self), "share": self.share, "interval": self.interval,
            "mean_matching": self.mean_matching,
        }  # fmt: skip


def draw_passages(
    reader: SplitReader, split: Split, count: int, *, length: int, seed: int
) -> list[np.ndarray]:
    """At most `count` passages of `length` tokens, drawn by the seed, each within one document and
    none overlapping another; fewer where the split holds no more. A document's bos may begin one;
    none holds an eos, after which nothing is to be continued."""
    places = reader.record.tokens // length
    if not places:
        return []
    order = Permutation(places, f"{reader.index.fingerprint}/{split}/{length}/{seed}".encode())
    passages: list[np.ndarray] = []
    for place in order(np.arange(min(places, _LOOKED_AT * count))):
        start = int(place) * length
        if reader.starts_between(start + 1, start + length).size:
            continue
        passage = reader.tokens(start, start + length)
        if passage[-1] == reader.index.eos_id:
            continue
        passages.append(passage)
        if len(passages) == count:
            break
    return passages


def reproduce(
    engine: Engine,
    passages: list[np.ndarray],
    prefix_tokens: int,
    *,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[int]:
    """How many tokens of each passage's continuation greedy decoding gives back; a passage is left
    at the first wrong one."""
    decoder = engine.open()
    wanted = [passage[prefix_tokens:].tolist() for passage in passages]
    requests = [
        Request(passage[:prefix_tokens].tolist(), len(rest))
        for passage, rest in zip(passages, wanted, strict=True)
    ]
    matching, is_wrong, done = [0] * len(passages), [False] * len(passages), 0
    for index, event in feed(decoder, requests, in_flight=2 * engine.options.max_batch_size):
        done += event.finish_reason is not None
        tell(done, len(requests))
        if is_wrong[index] or event.token < 0:
            continue
        if event.token == wanted[index][matching[index]]:
            matching[index] += 1
            continue
        is_wrong[index] = True
        if event.finish_reason is None:
            decoder.cancel(event.request_id)
    return matching
