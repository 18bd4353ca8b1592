"""`solollm runs card`: every figure is the run's own, and nothing private is in it."""

from __future__ import annotations

import json
import socket
from getpass import getuser
from pathlib import Path
from typing import Any

import pytest

from solollm.checkpoint import open_checkpoint
from solollm.cli import main
from solollm.completion import find_checkpoint
from solollm.data.build import build_corpus
from solollm.data.report import read_report
from solollm.errors import SoloLLMError
from solollm.export.record import sample_section, table
from solollm.export.run_card import run_card
from solollm.runs import Run

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from files with telling names, two of them equal."""
    folder = tmp_path_factory.mktemp("notes-of-ada")
    for number in range(12):
        words = " ".join(f"{chr(97 + number)}word{place * number % 97}" for place in range(300))
        (folder / f"secret-plan-{number}.txt").write_text(words)
    (folder / "secret-plan-copy.txt").write_text((folder / "secret-plan-3.txt").read_text())
    out = folder.parent / "corpora" / "small"
    build_corpus([str(folder)], out, vocab_size=512, validation_fraction=0.2)
    return out


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, evaluated."""
    path = tmp_path_factory.mktemp("card") / "poet"
    words = [
        "pretrain", "--corpus", str(corpus), "--run", str(path), "--depth", "1",
        "--set", "train.steps=2", "--set", "data.seq_len=32",
    ]  # fmt: skip
    assert main(words) == 0
    assert main(["eval", str(path), "--max-bytes", "2000"]) == 0
    return path


def test_every_figure_is_the_runs_own(run: Path, corpus: Path) -> None:
    """Guards the card against figures that nothing on the disk gives."""
    text = run_card(run)
    checkpoint = open_checkpoint(find_checkpoint(run)[0])
    report, state = read_report(corpus), checkpoint.state
    train, held_out = report.splits["train"], report.splits["validation"]
    rows = [row for row in Run.open(run).read_metrics() if row["kind"] == "eval"]
    (stored,) = (run / "evaluations").glob("*.json")
    (score,) = json.loads(stored.read_text())["texts"]
    checkpoint.close()
    for fact in (
        f"# {run.name}\n", f"of {checkpoint.model.num_parameters():,} parameters",
        f"`{checkpoint.certificate.digest}`", f"`{state.data.fingerprint}`",
        f"| tokens trained on | {state.tokens_seen:,} |", "| steps | 2 of 2 planned |",
        f"| trained on | {train.documents:,} documents, {train.tokens:,} tokens,",
        f"| held out | {held_out.documents:,} documents, {held_out.tokens:,} tokens,",
        f"| passes over it | {state.tokens_seen / train.tokens:.2f} |",
        "| left out | of 13 items: 1 equal to another |",
        f"**{rows[-1]['loss']:.4f} nats per token**", f"{score['bits_per_byte']:.4f} bits per byte",
    ):  # fmt: skip
        assert fact in text, text


def test_nothing_private_is_in_it(run: Path, corpus: Path) -> None:
    """Guards who publishes a card: it names no folder, file, machine or person."""
    text = run_card(run, licence="apache-2.0", languages=("en",))
    sources = ["secret-plan", "notes-of-ada"]
    for private in (str(run.parent), str(corpus), socket.gethostname(), *sources):
        assert private not in text, private
    assert f"/{getuser()}/" not in text
    assert 'license: "apache-2.0"\nlanguage:\n- "en"\n' in text
    assert "No licence is stated" not in text


def test_without_its_corpus_a_run_says_so(run: Path, tmp_path: Path) -> None:
    """Guards a run that was moved, and one whose corpus was built anew: no figures of another."""
    moved = tmp_path / "moved" / "runs" / "poet"
    moved.mkdir(parents=True)
    for file in run.rglob("*"):
        if file.is_file():
            place = moved / file.relative_to(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    text = run_card(moved)
    assert "not at hand any more" in text
    assert "passes over it" not in text


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the skin: printed or written, never over a file, and one clear error for no run."""
    capsys.readouterr()
    assert main(["runs", "card", str(run)]) == 0
    assert capsys.readouterr().out == run_card(run)
    out = tmp_path / "README.md"
    assert main(["runs", "card", str(run), "--out", str(out), "--name", "My\nmodel | x"]) == 0
    assert "# My model | x\n" in out.read_text()
    assert main(["runs", "card", str(run), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["runs", "card", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err


def test_a_damaged_checkpoint_has_no_card(run: Path, tmp_path: Path) -> None:
    """Guards against a card of files that are not what was trained."""
    broken = tmp_path / "broken"
    for file in run.rglob("*"):
        if file.is_file():
            place = broken / file.relative_to(run)
            place.parent.mkdir(parents=True, exist_ok=True)
            content = file.read_bytes()
            place.write_bytes(content[:-1] if file.name == "model.safetensors" else content)
    with pytest.raises(SoloLLMError):
        run_card(broken)


def test_what_a_model_wrote_stays_in_its_fence() -> None:
    """Guards the page: text of a model may be Markdown, and cells may hold bars."""
    rows: list[dict[str, Any]] = [
        {"kind": "sample", "step": 3, "prompt": "a", "text": "````\n# no head\x1b[2J"},
        {"kind": "sample", "step": 9, "prompt": "", "text": "later"},
    ]
    section = sample_section(rows, 5)
    assert section == "Written at step 3, unedited:\n\n`````text\na````\n# no head[2J\n`````\n"
    assert sample_section(rows, 2) == ""
    assert table(("a", "b"), [("x|y", "two\nlines")]).endswith("| x\\|y | two lines |\n")
