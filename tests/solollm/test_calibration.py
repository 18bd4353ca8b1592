"""A step's parts solved from smaller steps, and rates that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from solollm.backend import Plan, SessionOptions
from solollm.calibration import (
    Calibration,
    Parts,
    Rates,
    Variant,
    calibrate,
    solve,
    synthetic_batch,
)
from solollm.config import OptimizerTable
from solollm.dial import from_depth
from solollm.testing.toy import ToyBackend

TRUE = Parts(update=0.3, update_layer=0.05, micro_batch=0.2, micro_batch_layer=0.4)


def _measured(*variants: Variant) -> dict[Variant, float]:
    return {v: TRUE.step(v.layers, v.micro_batches) for v in variants}


def test_four_variants_give_the_parts_exactly() -> None:
    """A forecast of 24 layers from 2 and 4 that is off by the parts it mixed up."""
    found = solve(_measured(Variant(2, 1), Variant(2, 2), Variant(4, 1), Variant(4, 2)))
    assert vars(found) == pytest.approx(vars(TRUE))
    assert found.step(24, 16) == pytest.approx(TRUE.step(24, 16))


def test_one_micro_batch_still_extrapolates_over_layers() -> None:
    """A run without accumulation: nothing to tell the update from the rest, and no need to."""
    found = solve(_measured(Variant(2, 1), Variant(4, 1)))
    assert found.step(12, 1) == pytest.approx(TRUE.step(12, 1))


def test_noise_never_makes_a_part_negative() -> None:
    """A deeper model that measured faster: a negative slope forecasts negative seconds."""
    found = solve({Variant(1, 1): 1.2, Variant(2, 1): 1.0})
    assert found.step(40, 1) > 0
    assert min(vars(found).values()) >= 0


def test_a_session_is_measured_at_its_own_width() -> None:
    """Variants that change more than the depth measure another computation."""
    backend = ToyBackend()
    model = from_depth(4, 64)
    options = SessionOptions(OptimizerTable(name="adamw"))
    plan = Plan(1, False, "float32", 16, 2)
    found = calibrate(
        backend, model, options, plan, steps=12,
        sample_batch=lambda rows, seq_len: synthetic_batch(model, rows, seq_len),
    )  # fmt: skip
    assert isinstance(found, Calibration)
    assert sorted(found.measured) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(seconds.cpu > 0 and seconds.wall > 0 for seconds in found.measured.values())
    cpu = solve({variant: seconds.cpu for variant, seconds in found.measured.items()})
    wall = solve({variant: seconds.wall for variant, seconds in found.measured.items()})
    assert (found.step_cpu_seconds, found.step_seconds) == (cpu.step(4, 2), wall.step(4, 2))


def test_rates_are_kept_and_the_nearest_width_answers(tmp_path: Path) -> None:
    """A rate of a narrow model taken for a wide one although the wide one was measured."""
    path = tmp_path / "deep" / "rates.json"
    Rates(path).add("torch/cpu/float32", 128, 1e9)
    Rates(path).add("torch/cpu/float32", 2048, 5e9)
    kept = Rates(path)
    assert kept.nearest("torch/cpu/float32", 160) == 1e9
    assert kept.nearest("torch/cpu/float32", 1024) == 5e9
    assert kept.nearest("torch/cpu/bfloat16", 1024) == 0.0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"x": 1}}'])
def test_a_broken_cache_is_no_cache(tmp_path: Path, content: str) -> None:
    """A half-written cache file that stops every later plan."""
    path = tmp_path / "rates.json"
    path.write_text(content)
    assert Rates(path).nearest("a", 128) == 0.0
    Rates(path).add("a", 128, 2e9)
    assert Rates(path).nearest("a", 128) == 2e9


def test_a_cache_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    """A plan that dies because the home folder is read-only."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    Rates(blocked / "rates.json").add("a", 128, 1e9)
