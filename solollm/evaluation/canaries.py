"""How far a model has memorised the canaries of its corpus: their exposure, beside controls'.

What is ranked is the model's perplexity of the whole sentence, from bos on, as it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from solollm.completion import TextModel
from solollm.data.canaries import PREFIX, REPEATS, SPACE, Canaries
from solollm.evaluation.exposure import Exposure, SkewNormal, chance, exposures
from solollm.generation import loglikelihood


@dataclass(frozen=True)
class CanaryGroup:
    """Numbers planted equally often; `repeats` 0: the controls, which never were."""

    repeats: int
    numbers: tuple[str, ...]
    exposures: tuple[Exposure, ...]

    @property
    def bits(self) -> list[float]:
        return [exposure.bits for exposure in self.exposures]

    @property
    def mean(self) -> float:
        return fmean(self.bits)

    @property
    def chance(self) -> float:
        """How likely numbers that were never planted come to as much."""
        return chance(self.bits)

    @property
    def num_first(self) -> int:
        """How many are likelier than every candidate."""
        return sum(exposure.rank == 1 for exposure in self.exposures)

    @property
    def extrapolated(self) -> float | None:
        """The mean, with what is extrapolated in the place of the most that the sample shows."""
        if not any(exposure.extrapolated is not None for exposure in self.exposures):
            return None
        return fmean(
            exposure.bits if exposure.extrapolated is None else exposure.extrapolated
            for exposure in self.exposures
        )

    def document(self) -> dict[str, Any]:
        return {
            "repeats": self.repeats, "count": len(self.numbers), "mean": self.mean,
            "median": median(self.bits), "least": min(self.bits), "most": max(self.bits),
            "num_first": self.num_first, "extrapolated_mean": self.extrapolated,
            "chance": self.chance,
            "numbers": [
                {"number": number, **exposure._asdict()}
                for number, exposure in zip(self.numbers, self.exposures, strict=True)
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class CanaryResult:
    """`groups`: the controls, then by rising repeats. `law`: behind what is extrapolated."""

    groups: tuple[CanaryGroup, ...]
    num_candidates: int
    seed: int
    law: SkewNormal | None

    @property
    def resolution(self) -> float:
        """The most bits that this many candidates can show."""
        return math.log2(self.num_candidates + 1)

    def document(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "space": SPACE, "candidates": self.num_candidates,
            "resolution": self.resolution,
            "skew_normal": vars(self.law) if self.law is not None else None,
            "groups": [group.document() for group in self.groups],
        }  # fmt: skip


def measure_canaries(
    model: TextModel,
    canaries: Canaries,
    *,
    num_candidates: int,
    tell: Callable[[str, int, int], None] = lambda kind, done, total: None,
) -> CanaryResult:
    """Rank every canary and every control among the same candidates.

    Raises:
        ConfigError: the sentence does not fit the model's context.
    """
    members = {0: canaries.controls} | {
        repeats: tuple(c.number for c in canaries.planted if c.repeats == repeats)
        for repeats in REPEATS
    }
    secrets = [number for numbers in members.values() for number in numbers]
    perplexities = _perplexities(
        model, [*secrets, *canaries.candidates(num_candidates)],
        lambda done, total: tell("canaries", done, total),
    )  # fmt: skip
    found, law = exposures(perplexities[: len(secrets)], perplexities[len(secrets) :], SPACE)
    groups, first = [], 0
    for repeats, numbers in members.items():
        groups.append(CanaryGroup(repeats, numbers, tuple(found[first : first + len(numbers)])))
        first += len(numbers)
    return CanaryResult(tuple(groups), num_candidates, canaries.seed, law)


def _perplexities(
    model: TextModel, numbers: list[str], tell: Callable[[int, int], None]
) -> np.ndarray:
    """-log2 p of each number's sentence, [n]: the paper's log-perplexity."""
    tokenizer = model.tokenizer
    encoded = tokenizer.encode_batch([PREFIX + number for number in numbers])
    pairs = [([tokenizer.bos_id], ids.tolist()) for ids in encoded]
    scores = loglikelihood(model.engine, pairs, tell=tell)
    return np.array([-score / math.log(2) for score, _ in scores])
