"""`solollm finetune` on MLX: a run like any other, that PyTorch goes on with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("mlx_lm", reason="these tests need mlx-lm")

from solollm.checkpoint import Checkpoint, latest_checkpoint
from solollm.config import RunConfig
from solollm.continuation import BANDS, REQUANTISED_BAND
from solollm.errors import StoppedBySignal
from solollm.finetune.tuning import finetune
from solollm.packing import pack, unpack
from solollm.pretraining import resume
from solollm.runs import Run
from solollm.testing.watching import StopAt

MakeConfig = Callable[..., RunConfig]


def newest(run: Path) -> Checkpoint:
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def losses_of(run: Path) -> dict[int, float]:
    rows = Run.open(run).read_metrics()
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_tuning_goes_on_there_and_elsewhere(
    tuning: MakeConfig, tmp_path: Path, method: str
) -> None:
    """Guards: anything that an adapter's checkpoint leaves out on MLX; a codec that belongs to one
    backend kept by the other."""
    config = tuning(
        f"finetune.method={method}", "checkpoint.every_steps=3", "optimizer.lr=0.01",
        "backend_options.mlx.compile=false",
    )  # fmt: skip
    straight, stopped, moved = (tmp_path / name for name in ("straight", "stopped", "moved"))
    finetune(config, straight, backend="mlx")
    first = newest(straight)
    assert first.adapter is not None
    assert first.adapter.base.codec == ("affine4" if method == "qlora" else "")
    with pytest.raises(StoppedBySignal):  # which writes down what comes next
        finetune(config, stopped, backend="mlx", sinks=[StopAt(2)])
    shutil.copytree(stopped, moved)
    assert resume(stopped, backend="mlx").start_step == 3
    assert newest(stopped).certificate.digest == first.certificate.digest
    resume(moved, backend="torch")
    there = newest(moved).adapter
    assert there is not None
    assert there.base.codec == ("nf4" if method == "qlora" else "")
    here, gone = losses_of(straight), losses_of(moved)
    proven = [row for row in Run.open(moved).read_events() if row["kind"] == "continuation_proven"]
    assert len(proven) == 1
    limit = REQUANTISED_BAND if method == "qlora" else BANDS["float32"]
    for step in (4, 5, 6):
        np.testing.assert_allclose(gone[step], here[step], rtol=limit)


@pytest.mark.slow
def test_a_packed_tuning_goes_on_there(tuning: MakeConfig, tmp_path: Path) -> None:
    """Guards the whole move of an adapter over a 4-bit base from PyTorch: the base comes along as
    it is and is quantised in MLX's codes, within the band that is written down."""
    config = tuning(
        "finetune.method=qlora", "checkpoint.every_steps=3", "optimizer.lr=0.01",
        "backend_options.mlx.compile=false",
    )  # fmt: skip
    finetune(config, tmp_path / "here", backend="torch")
    pack(tmp_path / "here", tmp_path / "moved.solo", step=3)
    moved = unpack(tmp_path / "moved.solo", tmp_path / "there").run
    assert resume(moved, backend="mlx").start_step == 3
    (proven,) = [e for e in Run.open(moved).read_events() if e["kind"] == "continuation_proven"]
    assert proven["tolerance"] == REQUANTISED_BAND
    adapter = newest(moved).adapter
    assert adapter is not None
    assert adapter.base.codec == "affine4"
    here, gone = losses_of(tmp_path / "here"), losses_of(moved)
    for step in (4, 5, 6):
        np.testing.assert_allclose(gone[step], here[step], rtol=REQUANTISED_BAND)
