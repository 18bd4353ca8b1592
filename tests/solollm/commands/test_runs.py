"""`solollm runs`: what there is, how it went, whether it is intact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from solollm.cli import main
from solollm.config import parse_config
from solollm.pretraining import pretrain
from solollm.resume_proof import tiny_config
from solollm.runs import Run
from solollm.tokenizer import Tokenizer

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folder(
    small_corpus: Path, small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with one finished run, `a`."""
    runs = tmp_path_factory.mktemp("runs")
    pretrain(tiny_config(small_corpus, small_tokenizer.padded_vocab_size, 3), runs / "a")
    return runs


def test_list_shows_every_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against runs that cannot be found again."""
    assert main(["runs", "list", str(folder)]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "step", "of", "loss"]
    assert row.split()[:4] == ["a", "finished", "3", "3"]
    assert main(["runs", "list", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["step"], shown["state"]) == ("a", 3, "finished")


def test_an_empty_folder_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against an empty answer to a newcomer's first question."""
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert "`solollm pretrain` starts one" in capsys.readouterr().out


def test_show_tells_the_story_and_writes_the_page(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a page that only exists if the training ended well."""
    (folder / "a" / "report.html").unlink()
    assert main(["runs", "show", str(folder / "a"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["checkpoints"] == [3]
    assert shown["bits_per_byte"] > 0
    (ran_on,) = shown["ran_on"]
    assert ran_on.startswith("steps 1 to 3: torch on cpu, float32")
    assert "torch 2." in ran_on
    assert (folder / "a" / "report.html").stat().st_size > 1000
    assert main(["runs", "show", str(folder / "a")]) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("objective", "row", "expected"),
    [
        ("grpo", {"loss": 0.75, "reward": 0.25}, {"held out reward  0.2500"}),
        ("dpo", {"loss": 0.5, "margin": 2.5, "accuracy": 1.0},
         {"held out loss    0.5000", "margin           2.5000", "accuracy         1.0000"}),
    ],
)  # fmt: skip
def test_show_has_no_figure_in_anothers_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str, row: dict[str, float],
    expected: set[str],
) -> None:  # fmt: skip
    """Guards: 1 - reward as a held-out loss, and `bits per byte  None`."""
    config = parse_config({"train": {"steps": 2}, "finetune": {"objective": objective}})
    run = Run.create(tmp_path / "run", config)
    run.append_metrics({"kind": "eval", "step": 2, "bits_per_byte": None, **row})
    assert main(["runs", "show", str(run.path)]) == 0
    shown = set(capsys.readouterr().out.splitlines())
    assert expected <= shown
    assert not [line for line in shown if line.startswith("bits per byte")]
    assert objective != "grpo" or not [line for line in shown if line.startswith("held out loss")]


def test_verify_reads_every_byte_and_ends_with_3_for_one_that_changed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a verdict that looks at sizes only."""
    assert main(["runs", "verify", str(folder / "a")]) == 0
    assert "step-00000003  intact" in capsys.readouterr().out
    weights = folder / "a" / "checkpoints" / "step-00000003" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["runs", "verify", str(folder / "a")]) == 3
    assert "1 of 1 checkpoints" in capsys.readouterr().err
