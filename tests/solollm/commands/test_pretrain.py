"""`solollm pretrain` as a user meets it: exit codes, what is printed, signals to a real process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from solollm.checkpoint import latest_checkpoint, open_checkpoint
from solollm.cli import main
from solollm.config import dump_config
from solollm.dial import TOKENS_PER_PARAMETER
from solollm.horizon import updated
from solollm.pretraining import resume
from solollm.resume_proof import tiny_config
from solollm.tokenizer import Tokenizer

pytest.importorskip("torch")

# A disk on which no checkpoint ever gets its name, for the process that is asked to stop twice.
_HANGING_DISK = """
import sys, time
from solollm import durable
from solollm.cli import main
class Hanging(durable.Disk):
    def rename(self, source, target):
        if target.name.startswith("step-"):
            print("hanging", flush=True)
            time.sleep(600)
        super().rename(source, target)
durable.DISK = Hanging()
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def config_file(tmp_path: Path, small_corpus: Path, small_tokenizer: Tokenizer) -> Path:
    config = tiny_config(small_corpus, small_tokenizer.padded_vocab_size, 400)
    path = tmp_path / "small.toml"
    path.write_text(dump_config(updated(config, "eval", sample_every_steps=400)))
    return path


def start(arguments: list[str], *, script: str | None = None) -> subprocess.Popen[str]:
    how = ["-c", script] if script else ["-m", "solollm"]
    return subprocess.Popen(
        [sys.executable, *how, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"no {text!r} in the output; {process.communicate()[1]}")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_signal_ends_the_process_with_its_code_and_a_checkpoint(
    config_file: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Guards against work lost to Ctrl-C or to a machine that is shut down."""
    run = tmp_path / "run"
    with start(["pretrain", "--config", str(config_file), "--run", str(run), "--json"]) as process:
        wait_for(process, '"step": 3')
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    last = json.loads(output.splitlines()[-1])["error"]
    assert last["exit_code"] == code
    checkpoint, damaged = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step >= 3
    assert damaged == []


def test_a_second_signal_ends_the_process_at_once(config_file: Path, tmp_path: Path) -> None:
    """Guards against a stop that hangs with its save and needs kill -9."""
    run = tmp_path / "run"
    arguments = ["pretrain", "--config", str(config_file), "--run", str(run), "--json"]
    with start(arguments, script=_HANGING_DISK) as process:
        wait_for(process, '"step": 1')
        process.send_signal(signal.SIGINT)
        wait_for(process, "hanging")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)  # the disk hangs ten times as long
    assert process.returncode == 130


def test_flags_and_settings_reach_the_run(
    tmp_path: Path, small_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a flag that is read and forgotten; --set has the last word."""
    run = tmp_path / "run"
    arguments = [
        "pretrain", "--corpus", str(small_corpus), "--run", str(run), "--depth", "1",
        "--set", "train.steps=2", "--set", "data.seq_len=32", "--set", "log.every_steps=1",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"finished {run}: step 2, held-out" in printed
    assert f'solollm generate {run} "Once upon a time"' in printed
    checkpoint = open_checkpoint(run / "checkpoints" / "step-00000002")
    assert checkpoint.model.num_hidden_layers == 1
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert resume(run).step == 2


def test_json_prints_one_document_per_line(
    tmp_path: Path, small_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against progress or prose between the lines that a program reads."""
    arguments = [
        "pretrain", "--corpus", str(small_corpus), "--run", str(tmp_path / "run"), "--depth", "1",
        "--set", "train.steps=2", "--set", "data.seq_len=32", "--set", "log.every_steps=1",
        "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [row["kind"] for row in rows]
    assert kinds[0] == "start"
    assert kinds[-1] == "finish"
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert rows[-1]["status"] == "finished"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_shows_the_plan_and_writes_nothing(
    small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch, as_json
) -> None:
    """Guards against a dry run that trains, or that hides what would be done."""
    monkeypatch.chdir(tmp_path)
    arguments = ["pretrain", "--corpus", str(small_corpus), "--depth", "2", "--dry-run"]
    assert main([*arguments, *(["--json"] if as_json else [])]) == 0
    printed = capsys.readouterr().out
    if as_json:
        shown: dict[str, Any] = json.loads(printed)
        assert shown["steps"] * shown["tokens_per_step"] >= TOKENS_PER_PARAMETER * 120_000
        assert shown["config"]["model"]["config"]["num_hidden_layers"] == 2
        assert sum(shown["memory_bytes"].values()) < shown["memory_limit_bytes"]
    else:
        assert "2 layers, 64 wide" in printed
        assert "float32" in printed
    assert list(tmp_path.iterdir()) == []


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_typo_in_the_config_names_the_nearest_key(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a setting that is silently ignored because of one letter."""
    config_file.write_text(config_file.read_text().replace("batch_size", "batchsize", 1))
    assert main(["pretrain", "--config", str(config_file), "--run", str(tmp_path / "run")]) == 2
    error = error_of(capsys)
    assert (
        "unknown key `train.batchsize`" in error or "unknown key `train.micro_batchsize`" in error
    )
    assert "did you mean" in error
    assert not (tmp_path / "run").exists()


def test_usage_errors_end_with_2_and_say_what_to_do(
    small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a traceback, or exit code 1, for a mistake of the user."""
    assert main(["pretrain", "--corpus", str(small_corpus)]) == 2
    assert "--run runs/NAME" in error_of(capsys)
    assert main(["pretrain", "--run", str(tmp_path / "run")]) == 2
    assert "--corpus" in error_of(capsys)
    arguments = ["pretrain", "--corpus", str(small_corpus), "--run", str(tmp_path / "run")]
    assert main([*arguments, "--preset", "125mm"]) == 2
    assert "did you mean `125m`?" in error_of(capsys)
    assert main([*arguments, "--preset", "15m", "--depth", "3"]) == 2
    assert "preset and depth" in error_of(capsys)
