"""A run that changes its backend on the way, by `resume` and by the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("mlx_lm", reason="these tests need mlx-lm")
pytest.importorskip("torch", reason="these tests need torch")

from solollm.cli import main
from solollm.config import RunConfig, dump_config
from solollm.errors import StoppedBySignal
from solollm.horizon import updated
from solollm.pretraining import pretrain, resume
from solollm.registry import find_backends, select_backend
from solollm.resume_proof import tiny_training
from solollm.run_log import Row
from solollm.runs import Run

STEPS = 24
LOSS_TOLERANCE = 2e-4  # relative, fp32: the numerics contract, docs/design.md section 4


class StopAt:
    """A sink that asks the run to stop at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def metrics(self, row: Row) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def start(self, facts: Row) -> None: ...
    def evaluation(self, row: Row) -> None: ...
    def sample(self, row: Row) -> None: ...
    def event(self, row: Row) -> None: ...
    def finish(self, summary: Row) -> None: ...


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Packed rows in micro-batches of 4 and 2, a sample at the end, nothing compiled."""
    made = tiny_training(tmp_path_factory.mktemp("training"), steps=STEPS)
    made = updated(updated(made, "data", seq_len=32), "eval", sample_tokens=4)
    return made.model_copy(update={"backend_options": {"mlx": {"compile": False}}})


@pytest.fixture(scope="module")
def unmoved(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on torch alone."""
    run = tmp_path_factory.mktemp("unmoved") / "run"
    pretrain(config, run, backend="torch")
    return run


def losses(run: Path) -> list[tuple[int, float]]:
    rows = Run.open(run).read_metrics()
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


def test_torch_stays_the_choice_on_a_processor() -> None:
    """Guards against a slow backend that is taken because it is installed."""
    assert {"torch", "mlx"} <= {candidate.name for candidate in find_backends()}
    assert select_backend().backend.name == "torch"


@pytest.mark.parametrize(
    ("platform", "has_driver", "chosen"),
    [("darwin", False, "mlx"), ("linux", True, "torch"), ("linux", False, "torch")],
)
def test_each_machine_gets_its_backend_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, has_driver: bool, chosen: str
) -> None:
    """Guards against a Mac that trains on its processor, and a card that MLX leaves idle."""
    driver = tmp_path / "driver"
    if has_driver:
        driver.touch()
    monkeypatch.setattr("solollm_torch.backend.NVIDIA_DRIVER_SIGNS", (driver,))
    monkeypatch.setattr("solollm_torch.backend.version", lambda name: "2.13.0")
    monkeypatch.setenv("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1")  # or it would outlive this test
    monkeypatch.setattr("solollm_mlx.backend.sys.platform", platform)
    monkeypatch.setattr("solollm_mlx.backend.platform.machine", lambda: "arm64")
    selected = select_backend()
    assert selected.backend.name == chosen
    other = "torch" if chosen == "mlx" else "mlx"
    place = {"darwin": "apple gpu"}.get(platform, "cuda" if has_driver else "cpu")
    assert selected.reason == f"`{chosen}` on {place}: preferred over {other}"


def test_a_run_goes_from_torch_to_mlx_and_back(
    config: RunConfig, unmoved: Path, tmp_path: Path
) -> None:
    """Guards what no session sees: the plan made anew, the certificate's promise recomputed on the
    other backend, the lineage, no step done twice or left out."""
    run = tmp_path / "run"
    with pytest.raises(StoppedBySignal):
        pretrain(config, run, backend="torch", sinks=[StopAt(9)])
    with pytest.raises(StoppedBySignal):
        resume(run, backend="mlx", sinks=[StopAt(17)])
    assert resume(run, backend="torch").step == STEPS
    expected = losses(unmoved)
    assert [step for step, _ in losses(run)] == [step for step, _ in expected]
    values, wanted = ([loss for _, loss in rows] for rows in (losses(run), expected))
    np.testing.assert_allclose(values, wanted, rtol=LOSS_TOLERANCE)
    parts = Run.open(run).read_lineage()
    assert [part["environment"]["backend"] for part in parts] == ["torch", "mlx", "torch"]
    assert 0 == parts[0]["first_step"] < parts[1]["first_step"] < parts[2]["first_step"] < STEPS
    kinds = [event["kind"] for event in Run.open(run).read_events()]
    assert kinds.count("continuation_proven") == 2
    assert kinds.count("environment_changed") == 2


def test_a_run_goes_on_with_the_backend_it_has(config: RunConfig, tmp_path: Path) -> None:
    """Guards against a run that changes its backend because another is preferred here."""
    run = tmp_path / "run"
    with pytest.raises(StoppedBySignal):
        pretrain(updated(config, "train", steps=6), run, backend="mlx", sinks=[StopAt(2)])
    resume(run)
    parts = Run.open(run).read_lineage()
    assert [part["environment"]["backend"] for part in parts] == ["mlx"]
    assert parts[0]["environment"]["settings"] == {"compile": False}


def test_the_command_line_takes_either_backend(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards `--backend` on both commands, and what `runs show` tells of it."""
    run, file = tmp_path / "run", tmp_path / "config.toml"
    short = updated(updated(config, "train", steps=4), "checkpoint", every_steps=2)
    file.write_text(dump_config(short))
    assert main(["pretrain", "--config", str(file), "--run", str(run), "--backend", "mlx"]) == 0
    for backend in ("torch", "mlx"):
        shutil.rmtree(run / "checkpoints" / "step-00000004")
        assert main(["resume", str(run), "--backend", backend]) == 0
        capsys.readouterr()
        assert main(["runs", "show", str(run), "--json"]) == 0
        assert backend in json.dumps(json.loads(capsys.readouterr().out))
        assert Run.open(run).read_lineage()[-1]["environment"]["backend"] == backend
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4]
