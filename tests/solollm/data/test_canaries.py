"""Planted canaries: as many copies as written down, in the training split alone, and the rest of
the corpus as it would be without them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from solollm.commands.data import command
from solollm.data.build import build_corpus
from solollm.data.canaries import (
    CANARIES_NAME,
    NUM_CONTROLS,
    PREFIX,
    REPEATS,
    Canaries,
    read_canaries,
)
from solollm.data.inspection import view_documents
from solollm.data.report import read_report, render_report
from solollm.data.shards import SplitReader
from solollm.errors import ConfigError, IntegrityError
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import train_tokenizer

CANARIES = Canaries(7, seed=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a small text of some words"] * 3, 300)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notes")
    lines = [json.dumps({"text": f"note {n} of some words, {n * n} of them"}) for n in range(120)]
    (folder / "notes.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def planted(notes: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The notes with seven canaries; near duplicates out, as which their copies would count."""
    corpus = tmp_path_factory.mktemp("corpora") / "planted"
    build_corpus(
        [notes], corpus, tokenizer=tokenizer, validation_fraction=0.2, canaries=CANARIES,
        near_duplicates=0.9,
    )  # fmt: skip
    return corpus


def _texts(corpus: Path, split: str) -> list[str]:
    name = "train" if split == "train" else "validation"
    count = SplitReader(corpus, name).record.documents
    return [view.text for view in view_documents(corpus, split=name, count=count)]


def test_every_canary_stands_in_training_as_often_as_is_written_down(planted: Path) -> None:
    """Copies taken for duplicates, or held out, or a record that tells another story."""
    record = json.loads((planted / CANARIES_NAME).read_text())
    wanted = {PREFIX + entry["number"]: entry["repeats"] for entry in record["planted"]}
    assert sorted(wanted.values()) == [1, 1, 1, 4, 4, 16, 16]
    assert Counter(t for t in _texts(planted, "train") if t.startswith(PREFIX)) == wanted
    assert not [text for text in _texts(planted, "validation") if PREFIX in text]
    assert read_canaries(planted) == CANARIES


def test_the_rest_of_the_corpus_is_as_it_would_be_without_them(
    notes: Path, planted: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Canaries that move a document to another split or place, or that the tokenizer learns."""
    plain = tmp_path / "plain"
    build_corpus([notes], plain, tokenizer=tokenizer, validation_fraction=0.2, near_duplicates=0.9)
    own = [text for text in _texts(planted, "train") if not text.startswith(PREFIX)]
    assert own == _texts(plain, "train")
    assert _texts(planted, "validation") == _texts(plain, "validation")
    assert read_canaries(plain) is None
    trained = [
        build_corpus([notes], tmp_path / name, vocab_size=300, canaries=canaries)
        for name, canaries in (("a", None), ("b", CANARIES))
    ]
    assert trained[0].tokenizer_digest == trained[1].tokenizer_digest
    assert trained[0].fingerprint != trained[1].fingerprint


def test_copies_of_a_canary_lie_apart(planted: Path) -> None:
    """Sixteen copies side by side would be read in one batch, as one long document."""
    texts = _texts(planted, "train")
    number = next(c.text for c in CANARIES.planted if c.repeats == 16)
    places = [place for place, text in enumerate(texts) if text == number]
    assert sum(b - a == 1 for a, b in pairwise(places)) <= 5
    assert places[-1] - places[0] > len(texts) / 2


def test_the_report_counts_them_apart_from_items(planted: Path) -> None:
    """A sum that no longer holds, or canaries that pass for the user's text."""
    report = read_report(planted)
    assert report.planted == CANARIES.num_documents == 43
    assert (report.items, report.kept, report.unaccounted) == (120, 120, 0)
    assert sum(split.documents for split in report.splits.values()) == report.kept + 43
    assert "43 of the training documents are planted canaries" in render_report(report)


def test_the_commands_plant_and_show_them(notes: Path, tmp_path: Path) -> None:
    """The option and what a user sees of it; the same seed gives the same corpus."""
    prints = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        words = ["build", notes, "--out", tmp_path / name, "--vocab-size", 300, "--canaries", 6,
                 "--canary-seed", seed, "--json"]  # fmt: skip
        done = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
        prints.append(json.loads(done.stdout)["fingerprint"])
    assert prints[0] == prints[1] != prints[2]
    shown = CliRunner().invoke(command, ["inspect", str(tmp_path / "a"), "--count", "200"]).output
    assert shown.count(", a planted canary\n" + PREFIX) == 42
    assert "note 7 of" in shown


def test_planted_controls_and_candidates_are_all_different(tokenizer: Tokenizer) -> None:
    """A candidate that is a canary would be likely, and lower every other's exposure."""
    canaries = Canaries(1000, seed=1)
    numbers = [*canaries.controls, *(canary.number for canary in canaries.planted)]
    numbers += canaries.candidates(20_000)
    assert len(set(numbers)) == len(numbers) == NUM_CONTROLS + 21_000
    assert {len(number) for number in numbers} == {9}
    digits = Counter("".join(numbers))  # each is 1 in 10; 6 standard deviations are 0.4%
    assert all(0.095 < count / digits.total() < 0.105 for count in digits.values())
    assert {canary.repeats for canary in canaries.planted} == set(REPEATS)


def test_one_long_text_is_planted_around(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The end of a lone document is held out: its canaries belong to training all the same."""
    (tmp_path / "book.txt").write_text("\n".join(f"line {n} of a book" for n in range(200)))
    report = build_corpus(
        [tmp_path / "book.txt"], tmp_path / "corpus", tokenizer=tokenizer, canaries=CANARIES
    )
    assert report.splits["train"].documents == 1 + CANARIES.num_documents
    assert len(_texts(tmp_path / "corpus", "validation")) == 1
    assert report.planted == CANARIES.num_documents


@pytest.mark.parametrize("held", ["planted", "control"])
def test_a_text_that_holds_a_canary_already_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, held: str
) -> None:
    """A corpus made of an older one's output: the canary would be held out, or planted 17 times."""
    number = CANARIES.planted[2].number if held == "planted" else CANARIES.controls[0]
    other = f"{PREFIX}123. {PREFIX}{number}, it said\n"
    (tmp_path / "log.txt").write_text("before\n" + other)
    with pytest.raises(ConfigError, match=rf"log\.txt holds the canary .*{number}"):
        build_corpus(
            [tmp_path / "log.txt"], tmp_path / "corpus", tokenizer=tokenizer, canaries=CANARIES
        )
    assert not (tmp_path / "corpus").exists()
    build_corpus(
        [tmp_path / "log.txt"], tmp_path / "corpus", tokenizer=tokenizer,
        canaries=Canaries(7, seed=4),
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"count": 8}, {"seed": 4}, {"seed": True}, {"count": 10**9}, {"planted": []}, {"space": 1}],
)
def test_a_changed_record_is_refused(planted: Path, tmp_path: Path, change: dict) -> None:
    """Exposures of numbers that were never planted, called those of canaries."""
    record = json.loads((planted / CANARIES_NAME).read_text())
    (tmp_path / CANARIES_NAME).write_text(json.dumps({**record, **change}))
    with pytest.raises(IntegrityError, match="damaged"):
        read_canaries(tmp_path)
    (tmp_path / CANARIES_NAME).write_text("{")
    with pytest.raises(IntegrityError):
        read_canaries(tmp_path)


@pytest.mark.parametrize(("count", "seed"), [(2, 0), (-1, 0), (1001, 0), (60, -1), (60, 2**63)])
def test_counts_and_seeds_out_of_range_are_said(count: int, seed: int) -> None:
    """A third of two canaries, or a permutation's own error about its key."""
    with pytest.raises(ConfigError):
        Canaries(count, seed)
