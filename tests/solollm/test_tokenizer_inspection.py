"""Training from sources, measuring, and the two commands that show it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from solollm import tokenizer_inspection
from solollm.cli import main
from solollm.errors import ConfigError, DataError
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_inspection import inspect_tokenizer, train_from_sources
from solollm.tokenizer_training import train_tokenizer


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder of 200 small documents, one twice, and one file that is not text."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for n in range(200):
        (folder / f"{n:03}.txt").write_text(f"note number {n}: the cat sat on mat {n}\n" * 5)
    (folder / "again.txt").write_text((folder / "007.txt").read_text())
    (folder / "broken.txt").write_bytes(b"\xff\xfe\x00broken\x80\x81" * 9)
    return folder


def test_figures_of_a_known_text() -> None:
    """The figures that people choose vocabularies by, against numbers worked out by hand."""
    tokenizer = train_tokenizer(["aaaa aaaa"], 300, reserved_tokens=0)
    report = inspect_tokenizer(tokenizer, ["aaaa aaaa", "b"], measured_on="test")
    merges = [tokenizer.token_bytes(i) for i in range(263, tokenizer.vocab_size)]
    assert merges == [b"aa", b"aaaa", b" aaaa"]
    assert (report.text_bytes, report.num_tokens) == (10, 3)
    assert report.bytes_per_token == pytest.approx(10 / 3)
    assert (report.used_tokens, report.unused_tokens) == (3, 1)
    assert report.unused_examples == ("aa",)
    assert report.longest_tokens == (" aaaa", "aaaa", "aa")
    assert report.sample == ("aaaa", " aaaa")


def test_a_text_is_measured_whole_however_it_is_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches bound the memory; a batch lost at the end would flatter the figure."""
    tokenizer = train_tokenizer(["some words to learn " * 9], 300)
    texts = ["some", "words", "", "to learn", "é"]
    whole = inspect_tokenizer(tokenizer, texts, measured_on="x")
    monkeypatch.setattr(tokenizer_inspection, "_BATCH_CHARS", 2)
    assert inspect_tokenizer(tokenizer, texts, measured_on="x") == whole
    assert whole.text_bytes == len("".join(texts).encode())


def test_nothing_to_measure_is_an_error() -> None:
    """Zero divided by zero is no figure."""
    tokenizer = train_tokenizer(["text"], 300)
    with pytest.raises(DataError, match="no text"):
        inspect_tokenizer(tokenizer, [""], measured_on="x")


def test_training_from_sources_measures_on_held_out_documents(notes: Path, tmp_path: Path) -> None:
    """Bytes per token on the training text promise more than other text will keep."""
    report = train_from_sources([str(notes)], tmp_path / "out", vocab_size=400)
    assert report.measured_on == "held-out documents"
    assert 0 < report.text_bytes < 20_000
    assert report.skipped_items == 1
    again = train_from_sources([str(notes)], tmp_path / "again", vocab_size=400)
    digests = {Tokenizer.load(tmp_path / name).digest for name in ("out", "again")}
    assert again == report
    assert len(digests) == 1


def test_a_duplicate_counts_once(notes: Path, tmp_path: Path) -> None:
    """A licence that stands in a thousand files would else fill the vocabulary."""
    train_from_sources([str(notes)], tmp_path / "with", vocab_size=400)
    (notes / "again.txt").unlink()
    train_from_sources([str(notes)], tmp_path / "without", vocab_size=400)
    digests = {Tokenizer.load(tmp_path / name).digest for name in ("with", "without")}
    assert len(digests) == 1


def test_an_existing_tokenizer_is_not_overwritten(notes: Path, tmp_path: Path) -> None:
    """Corpora made with it could not be read any more."""
    train_from_sources([str(notes)], tmp_path, vocab_size=400)
    before = Tokenizer.load(tmp_path).digest
    with pytest.raises(ConfigError, match="holds a tokenizer already"):
        train_from_sources([str(notes)], tmp_path, vocab_size=500)
    assert Tokenizer.load(tmp_path).digest == before
    train_from_sources([str(notes)], tmp_path, vocab_size=500, overwrite=True)
    assert Tokenizer.load(tmp_path).digest != before


def test_sources_without_text_are_an_error(tmp_path: Path) -> None:
    """An empty vocabulary helps nobody, and no file may be left behind."""
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no text to train on"):
        train_from_sources([str(tmp_path)], tmp_path / "out", vocab_size=400)
    assert not (tmp_path / "out").exists()


def test_commands_train_and_inspect(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way of the documentation: train, look, measure on other text."""
    out = tmp_path / "tokenizer"
    arguments = ["tokenizer", "train", str(notes), "--out", str(out), "--vocab-size", "400"]
    assert main([*arguments]) == 0
    assert "bytes per token" in capsys.readouterr().out
    assert main([*arguments]) == 2
    capsys.readouterr()
    assert main(["tokenizer", "inspect", str(out), "--text", "the cat 12", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert "".join(figures["sample"]) == "the cat 12"
    assert figures["bytes_per_token"] == figures["text_bytes"] / figures["num_tokens"]
    assert main(["tokenizer", "inspect", str(tmp_path), "--on", str(notes)]) == 0  # a corpus
    assert "the cat".replace(" ", "| ") in capsys.readouterr().out
    assert main(["tokenizer", "inspect", str(out), "--on", str(notes), "--text", "x"]) == 2
    assert main(["tokenizer", "inspect", str(notes)]) == 3
