"""Which compute dtype a measurement chooses, and that the planner finds the choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from solollm import doctor, dtype_choice
from solollm.architecture import ModelConfig
from solollm.backend import Capabilities, SessionOptions
from solollm.config import OptimizerTable, RunConfig, parse_config
from solollm.dtype_choice import cache_file, fastest, preferred_dtype, remember
from solollm.planner import plan
from solollm.testing.toy import ToyBackend

M1 = {"float32": 2.0, "bfloat16": 1.4, "float16": 2.6}
M3 = {"float32": 2.0, "bfloat16": 3.4, "float16": 3.5}


class AppleBackend(ToyBackend):
    """A chip with three dtypes."""

    device = "Apple M1"

    def capabilities(self) -> Capabilities:
        return replace(
            super().capabilities(), device=self.device,
            train_dtypes=("float32", "bfloat16", "float16"), versions={"toy": "1"},
        )  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("rates", "choice"),
    [
        (M1, "float16"),
        (M3, "bfloat16"),
        ({"float32": 2.0, "bfloat16": 2.2, "float16": 2.2}, "float32"),
        ({"float32": 2.0}, "float32"),
    ],
)
def test_sixteen_bits_have_to_earn_their_cost(rates: dict[Any, float], choice: str) -> None:
    """fp16 with its scaler where bf16 is as fast; bf16 that is emulated."""
    assert fastest(rates) == choice


def test_the_planner_takes_what_was_measured_here_and_only_that(tiny_config: ModelConfig) -> None:
    """A measurement without effect; one of another device or version taken for this one's."""
    backend, options = AppleBackend(), SessionOptions(OptimizerTable())

    def planned(config: RunConfig) -> str:
        return plan(tiny_config, options, config, backend, batch_size=2, seq_len=32).compute_dtype

    assert planned(RunConfig()) == "float32"
    assert remember(backend.capabilities(), M1) == "float16"
    assert planned(RunConfig()) == "float16"
    assert planned(parse_config({"train": {"compute_dtype": "float32"}})) == "float32"
    other = replace(backend.capabilities(), device="Apple M3")
    assert preferred_dtype(other) == "float32"
    newer = replace(backend.capabilities(), versions={"toy": "2"})
    assert preferred_dtype(newer) == "float32"


@pytest.mark.parametrize("text", ["{", "[1]", '{"toy 1 on Apple M1": "int4"}'])
def test_a_broken_cache_is_no_error(text: str) -> None:
    """A torn file that stops every training."""
    cache_file().parent.mkdir()
    cache_file().write_text(text)
    backend = AppleBackend()
    assert preferred_dtype(backend.capabilities()) == "float32"


def test_the_doctor_times_in_a_child_and_keeps_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timing that is shown and forgotten; one on a CPU, where there is nothing to choose."""
    backend = AppleBackend()
    monkeypatch.setattr(doctor, "_DTYPE_SCRIPT", f"import json; print(json.dumps({M1!r}))")
    timing = doctor.time_dtypes(backend, 0.1)
    assert timing is not None
    assert timing.choice == "float16"
    assert timing.gflops["float32"] == pytest.approx(2e-9)
    assert preferred_dtype(backend.capabilities()) == "float16"
    assert doctor.time_dtypes(ToyBackend(), 0.1) is None
    monkeypatch.setattr(doctor, "_DTYPE_SCRIPT", "raise SystemExit(1)")
    assert doctor.time_dtypes(backend, 0.1) is None
    assert dtype_choice.cache_file().is_file()
