"""Exposure: how far a secret stands out among secrets that could have stood in its place.

Carlini et al. 2019, "The Secret Sharer: Evaluating and Testing Unintended Memorization in Neural
Networks" (USENIX Security): log2 of the number of candidates less log2 of the secret's rank by the
model's perplexity. A secret that the model never learnt from has every rank with the same
probability, so its exposure is 1.44 bits on average (log2 e), whatever the model: that is no
assumption. The most that a sample can show is the exposure of rank 1. What lies beyond is
extrapolated by a skew-normal distribution of the candidates' perplexities, as the paper does, and
that is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_MOST_SKEW = 0.99  # a skew-normal's is below 0.9953
_REACH = 12.0  # standard deviations: nothing of a normal density is left beyond
_GRID = 40_001


class Exposure(NamedTuple):
    """Of one secret. `bits`: by its rank; where no candidate is likelier than it, that is the most
    that the sample can show, and `extrapolated` says what the fitted distribution makes of it."""

    perplexity: float
    rank: int
    bits: float
    extrapolated: float | None


@dataclass(frozen=True)
class SkewNormal:
    """A skew-normal distribution (Azzalini 1985) and how well it fits what it was made of:
    `distance` is Kolmogorov and Smirnov's, `fit` the chance of a larger one if the sample came from
    it. The parameters were taken from the same sample, so the true chance is smaller."""

    location: float
    scale: float
    shape: float
    distance: float = 0.0
    fit: float = 1.0

    def below(self, values: np.ndarray) -> np.ndarray:
        """P(X <= value) for each, to about 1e-4 of itself far out on the left too."""
        z = (np.asarray(values, np.float64) - self.location) / self.scale
        grid = np.linspace(min(z.min(), 0) - _REACH, max(z.max(), 0), _GRID)
        half = np.array([math.erfc(-self.shape * t / math.sqrt(2)) for t in grid])
        density = np.exp(-grid * grid / 2) / math.sqrt(2 * math.pi) * half
        step = grid[1] - grid[0]
        cumulative = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2 * step)))
        return np.interp(z, grid, cumulative)


def fit_skew_normal(sample: np.ndarray) -> SkewNormal | None:
    """By the sample's mean, deviation and skewness; None where all of it is one value."""
    mean, deviation = float(sample.mean()), float(sample.std())
    if not deviation > 1e-9 * max(1.0, abs(mean)):
        return None
    skew = float((((sample - mean) / deviation) ** 3).mean())
    root = min(abs(skew), _MOST_SKEW) ** (2 / 3)
    delta = math.copysign(
        math.sqrt(math.pi / 2 * root / (root + ((4 - math.pi) / 2) ** (2 / 3))), skew
    )
    scale = deviation / math.sqrt(1 - 2 * delta**2 / math.pi)
    location = mean - scale * delta * math.sqrt(2 / math.pi)
    plain = SkewNormal(location, scale, delta / math.sqrt(1 - delta**2))
    ordered = np.sort(sample)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    below = plain.below(ordered)
    distance = float(max((steps[1:] - below).max(), (below - steps[:-1]).max()))
    return SkewNormal(
        location, scale, plain.shape, distance, kolmogorov_chance(distance, len(ordered))
    )


def exposures(
    secrets: np.ndarray, candidates: np.ndarray, space: int
) -> tuple[list[Exposure], SkewNormal | None]:
    """The exposure of every secret among the candidates, and the distribution behind what is
    extrapolated; None where nothing is.

    Args:
        secrets: [S] perplexities in bits: -log2 p of each secret.
        candidates: [N] those of the candidates, N > 0.
        space: of how many the candidates are a sample; log2 of it is the largest exposure.
    """
    ordered = np.sort(candidates)
    # Equal ones count as likelier: nothing is called memorised by a tie.
    ranks = 1 + np.searchsorted(ordered, secrets, side="right")
    law = fit_skew_normal(ordered) if (ranks == 1).any() else None
    tails = law.below(secrets) if law is not None else np.zeros(len(secrets))
    most, found = math.log2(space), []
    for perplexity, rank, tail in zip(secrets, ranks, tails, strict=True):
        bits = min(math.log2(len(ordered) + 1) - math.log2(rank), most)
        beyond = None
        if rank == 1 and law is not None:
            beyond = max(bits, min(most, -math.log2(tail) if tail > 0 else most))
        found.append(Exposure(float(perplexity), int(rank), bits, beyond))
    return found, law


def chance(bits: Sequence[float]) -> float:
    """How likely secrets that were never learnt from have together at least these exposures
    (Fisher's method: each is then exponential with a mean of log2 e bits, or less by ties)."""
    total = math.log(2) * sum(bits)
    if not total:
        return 1.0
    terms = [count * math.log(total) - math.lgamma(count + 1) for count in range(len(bits))]
    most = max(terms)
    return min(1.0, math.exp(most - total) * math.fsum(math.exp(term - most) for term in terms))


def kolmogorov_chance(distance: float, count: int) -> float:
    """P(a larger distance), asymptotically (Stephens 1970)."""
    root = math.sqrt(count)
    reach = (root + 0.12 + 0.11 / root) * distance
    if reach < 0.3:  # the sum below converges slowly, and is 1 to nine digits
        return 1.0
    terms = [math.exp(-2 * (k * reach) ** 2) for k in range(1, 101)]
    return min(1.0, max(0.0, 2 * (sum(terms[::2]) - sum(terms[1::2]))))
