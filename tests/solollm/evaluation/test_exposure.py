"""The arithmetic of exposure, against brute force and closed forms."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from solollm.evaluation.exposure import (
    SkewNormal,
    chance,
    exposures,
    fit_skew_normal,
    kolmogorov_chance,
)


def _skewed(rng: np.random.Generator, count: int, shape: float) -> np.ndarray:
    """Skew-normal numbers, location 30 and scale 4 (Azzalini 1985: delta |u| + ... v)."""
    delta = shape / math.sqrt(1 + shape**2)
    first, second = rng.standard_normal((2, count))
    return 30 + 4 * (delta * np.abs(first) + math.sqrt(1 - delta**2) * second)


def test_ranks_are_those_of_counting() -> None:
    """An off-by-one between rank and number of better ones; ties that favour the secret."""
    rng = np.random.default_rng(0)
    candidates = rng.integers(0, 50, 200).astype(float)
    secrets = np.array([*rng.integers(-2, 53, 60), -1.0, 51.0])
    found, _ = exposures(secrets, candidates, 10**9)
    for secret, exposure in zip(secrets, found, strict=True):
        rank = 1 + sum(candidate <= secret for candidate in candidates)
        assert exposure.rank == rank
        assert exposure.bits == pytest.approx(math.log2(201) - math.log2(rank), abs=1e-12)
        assert (exposure.extrapolated is None) == (rank > 1)
    assert found[-2].bits == pytest.approx(math.log2(201))
    assert found[-1].bits == 0


def test_what_lies_beyond_the_sample_is_what_brute_force_finds() -> None:
    """A tail on the wrong side, or of the wrong law: a fitted distribution must tell what four
    million draws tell of one in 2^17. Within 0.4 bits: of that many draws 32 are likelier, give or
    take 6, which is 0.25 bits, and a fit to 2^18 errs by 0.1. One to 4,096 errs by 0.7 bits (one
    standard deviation, measured), and four of those are allowed."""
    rng = np.random.default_rng(1)
    for shape in (-2.0, 0.0, 1.5):
        secret = np.sort(_skewed(rng, 2**22, shape))[[2**5]]  # at 17 bits
        law = fit_skew_normal(_skewed(rng, 2**18, shape))
        assert law is not None
        assert -math.log2(law.below(secret)[0]) == pytest.approx(17, abs=0.4)
        sample = _skewed(rng, 4096, shape)
        (exposure,), _ = exposures(secret, sample[sample > secret], 10**9)
        assert exposure.rank == 1
        assert exposure.extrapolated == pytest.approx(17, abs=2.8)


def test_no_exposure_is_larger_than_the_space() -> None:
    """Hundreds of bits for a secret of thirty."""
    sample = _skewed(np.random.default_rng(2), 1000, 1.0)
    (exposure,), _ = exposures(np.array([-500.0]), sample, 10**9)
    assert exposure.extrapolated == pytest.approx(math.log2(10**9))
    (exposure,), law = exposures(np.array([1.0]), np.full(1000, 2.0), 10**9)
    assert (exposure.rank, exposure.extrapolated, law) == (1, None, None)
    (exposure,), _ = exposures(np.array([2.0]), np.full(1000, 2.0), 10**9)
    assert (exposure.rank, exposure.bits) == (1001, 0)


def test_the_skew_normal_is_the_one_of_the_books() -> None:
    """Shape 0 is the normal law, and shape 1 its square, from the middle to far out."""
    z = np.linspace(-6, 3, 19)
    normal = np.array([NormalDist().cdf(value) for value in z])
    np.testing.assert_allclose(SkewNormal(0, 1, 0).below(z), normal, rtol=2e-4)
    np.testing.assert_allclose(SkewNormal(5, 2, 1).below(5 + 2 * z), normal**2, rtol=2e-4)


def test_a_fit_that_does_not_fit_says_so() -> None:
    """Two humps extrapolated as if they were one."""
    rng = np.random.default_rng(3)
    good = fit_skew_normal(_skewed(rng, 4000, 2.0))
    bad = fit_skew_normal(np.concatenate([rng.normal(0, 1, 2000), rng.normal(9, 1, 2000)]))
    assert good is not None
    assert bad is not None
    assert good.fit > 0.1 > 1e-6 > bad.fit
    # Kolmogorov's table: 10%, 5% and 1% at 1.224, 1.358 and 1.628.
    table = [kolmogorov_chance(reach / 1000, 1_000_000) for reach in (1.224, 1.358, 1.628)]
    np.testing.assert_allclose(table, [0.1, 0.05, 0.01], rtol=0.02)


def test_the_chance_of_a_group_is_exact() -> None:
    """A tail of the wrong law; and no overflow for many, or many bits."""
    assert chance([0.0, 0.0]) == 1
    for bits in (0.5, 3.0, 29.9):
        assert chance([bits]) == pytest.approx(2**-bits)
        total = math.log(2) * 2 * bits
        assert chance([bits, bits]) == pytest.approx(math.exp(-total) * (1 + total))
    assert chance([29.9] * 1000) == 0
    assert chance([math.log2(math.e)] * 1000) == pytest.approx(0.5, abs=0.02)


def test_secrets_like_the_candidates_are_called_memorised_as_often_as_they_should_be() -> None:
    """The whole chain on a model that knows nothing: 400 groups of 20. Of uniform chances a share
    of 0.05 lies below 0.05; 0.05 +- 4 standard deviations is 0.006 to 0.094."""
    rng = np.random.default_rng(4)
    below = 0
    for _ in range(400):
        draws = rng.normal(40, 3, 20 + 1000)
        found, _ = exposures(draws[:20], draws[20:], 10**9)
        below += chance([exposure.bits for exposure in found]) < 0.05
    assert 0.006 < below / 400 < 0.094
