"""`solollm resume`: goes on, or says that nothing is left to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from solollm.cli import main
from solollm.commands import pretrain
from solollm.runs import Run

pytest.importorskip("torch")


@pytest.fixture
def run(small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run of two steps."""
    path = tmp_path / "run"
    arguments = [
        "pretrain", "--corpus", str(small_corpus), "--run", str(path), "--depth", "1",
        "--set", "train.steps=2", "--set", "data.seq_len=32", "--set", "checkpoint.every_steps=1",
    ]  # fmt: skip
    assert main(arguments) == 0
    capsys.readouterr()
    return path


def test_a_finished_run_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a second training, or a silence that looks like one."""
    assert main(["resume", str(run)]) == 0
    assert f"{run} is finished already: nothing was done" in capsys.readouterr().out
    assert main(["resume", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "kind": "finish", "status": "finished", "step": 2,
    }  # fmt: skip


def test_that_a_large_corpus_is_read_first_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against minutes of silence before the first step."""
    assert main(["resume", str(run)]) == 0
    assert "reading the corpus" not in capsys.readouterr().err
    monkeypatch.setattr(pretrain, "_WORTH_SAYING", 1000)
    assert main(["resume", str(run)]) == 0
    assert "reading the corpus once, " in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_passed_over(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a fallback that nobody is told of."""
    (run / "checkpoints" / "step-00000002" / "config.json").write_text("{}")
    assert main(["resume", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "step-00000002" in printed
    assert "resumed after step 1" in printed
    assert f"finished {run}: step 2" in printed


def test_a_folder_that_is_no_run_and_a_locked_one_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against tracebacks for everyday mistakes, and against two writers."""
    assert main(["resume", str(tmp_path / "typo")]) == 2
    assert "is no run" in capsys.readouterr().err
    with Run.open(run).lock():
        assert main(["resume", str(run)]) == 1
    assert "is in use" in capsys.readouterr().err
