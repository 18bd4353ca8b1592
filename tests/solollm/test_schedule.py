"""The learning rate against its closed forms, and where the stages meet."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solollm.config import ScheduleTable
from solollm.schedule import decay_start, lr_at, warmup_steps


def curve(total: int, table: ScheduleTable, peak: float = 1.0) -> np.ndarray:
    return np.array([lr_at(s, total_steps=total, peak_lr=peak, table=table) for s in range(total)])


def test_wsd_is_warm_up_then_flat_then_linear() -> None:
    """Guards against off-by-one at either border: a lost peak or a decay that ends too early."""
    table = ScheduleTable(name="wsd", warmup_fraction=0.1, decay_fraction=0.5, final_fraction=0.02)
    expected = np.concatenate(
        [np.arange(1, 11) / 10, np.ones(40), 1 - np.arange(1, 51) / 50 * 0.98]
    )
    np.testing.assert_allclose(curve(100, table), expected, rtol=1e-12)
    assert decay_start(100, table) == 50


def test_cosine_matches_its_formula() -> None:
    """Guards against a cosine that restarts or stops half-way down."""
    table = ScheduleTable(name="cosine", warmup_fraction=0.25, final_fraction=0.1)
    got = curve(40, table, peak=3e-4)
    progress = np.arange(1, 31) / 30
    expected = 3e-4 * (0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2)
    np.testing.assert_allclose(got[10:], expected, rtol=1e-12)
    assert got[9] == pytest.approx(3e-4, rel=1e-12)


def test_linear_falls_by_equal_amounts_to_its_final_value() -> None:
    """Guards against `linear` quietly taking wsd's flat stage."""
    table = ScheduleTable(name="linear", warmup_fraction=0.0, final_fraction=0.0)
    np.testing.assert_allclose(curve(5, table), [0.8, 0.6, 0.4, 0.2, 0.0], atol=1e-12)


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear"])
def test_a_single_step_runs_at_the_peak(name: str) -> None:
    """Guards against a one-step run at lr 0, which trains nothing and says nothing."""
    table = ScheduleTable.model_validate({"name": name, "final_fraction": 0.0})
    assert lr_at(0, total_steps=1, peak_lr=0.5, table=table) == 0.5


def test_warm_up_wins_over_a_decay_that_overlaps_it() -> None:
    """Guards against a division by zero or a jump where fractions add up to more than one."""
    whole = ScheduleTable(name="wsd", warmup_fraction=1.0, decay_fraction=1.0)
    np.testing.assert_allclose(curve(4, whole), [0.25, 0.5, 0.75, 1.0])
    assert decay_start(4, whole) == 4
    overlap = ScheduleTable(name="wsd", warmup_fraction=0.5, decay_fraction=1.0, final_fraction=0.0)
    np.testing.assert_allclose(curve(4, overlap), [0.5, 1.0, 0.5, 0.0])


def test_without_decay_the_second_stage_never_starts() -> None:
    """Guards against a decay corpus that is read although nothing decays."""
    table = ScheduleTable(name="wsd", decay_fraction=0.0, warmup_fraction=0.0)
    assert decay_start(10, table) == 10
    assert curve(10, table).tolist() == [1.0] * 10


@given(
    name=st.sampled_from(["wsd", "cosine", "linear"]),
    total=st.integers(2, 500),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_lr_stays_within_its_band_and_never_rises_after_warm_up(
    name: str, total: int, warmup: float, decay: float, final: float
) -> None:
    """Guards against any combination of fractions that gives a negative, huge or rising rate."""
    table = ScheduleTable.model_validate(
        {
            "name": name,
            "warmup_fraction": warmup,
            "decay_fraction": decay,
            "final_fraction": final,
        }
    )
    rates = curve(total, table, peak=2.0)
    warm = warmup_steps(total, table)
    assert all(math.isfinite(rate) and 0 <= rate <= 2.0 for rate in rates)
    assert (np.diff(rates[:warm]) > 0).all()
    assert (np.diff(rates[max(0, warm - 1) :]) <= 1e-12).all()
    assert lr_at(total + 7, total_steps=total, peak_lr=2.0, table=table) == rates[-1]
