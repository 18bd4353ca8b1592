"""What an evaluation says of its items: looked for in the training text, not, or unknown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from solollm.completion import find_checkpoint
from solollm.data.build import build_corpus
from solollm.data.intake import Screening
from solollm.data.items import Limits
from solollm.evaluation.contamination import Contamination, contamination
from solollm.horizon import updated
from solollm.pretraining import pretrain
from solollm.resume_proof import tiny_config
from solollm.tokenizer import Tokenizer

pytest.importorskip("torch")
KNOWN = [{"question": f"In week {n} Ada saw {n} ships come in and {n} go out again, how many left?"}
         for n in range(6)]  # fmt: skip
OTHER = {"question": "A farmer has nine sheep and all but four of them run away, how many stay?"}
SHORT = {"question": "Who wrote it?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def run(folder: Path, small_tokenizer: Tokenizer) -> Path:
    """One that was trained for a step on a corpus built without the known items."""
    questions = folder / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, KNOWN)))
    texts = [f"{n} days of rain and nothing to be told of them. " * 20 for n in range(30)]
    texts.append(f"An exercise: {KNOWN[3]['question']}")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    corpus = folder / "corpora" / "clean"
    report = build_corpus(
        [folder / "texts.jsonl"], corpus, tokenizer=small_tokenizer, validation_fraction=0.2,
        screening=Screening(decontaminate=[str(questions)]),
    )  # fmt: skip
    assert report.decontaminated[0].texts == 1
    config = tiny_config(corpus, small_tokenizer.padded_vocab_size, 1)
    pretrain(updated(config, "checkpoint", every_steps=1), folder / "runs" / "clean")
    return folder / "runs" / "clean"


def _of(run: Path, *rows: dict[str, str]) -> Contamination:
    checkpoint, _ = find_checkpoint(run)
    (found,) = contamination(run, checkpoint, {"sums": rows})
    assert contamination(checkpoint, checkpoint, {"sums": rows}) == (found,)
    return found


def test_items_that_were_looked_for(run: Path) -> None:
    """Guards the hashes, and every kind of sentence."""
    found = _of(run, *KNOWN, SHORT)
    assert found == Contamination("sums", "clean", 6, 0, 1)
    assert found.sentence == (
        "sums: clean was built without texts that hold one of these 6 items (one is too short to"
        " be looked for)"
    )
    mixed = _of(run, *KNOWN, OTHER)
    assert (mixed.looked_for, mixed.not_looked_for) == (6, 1)
    assert "hold one of 6 of these items; 1 nobody looked for" in mixed.sentence
    assert "nobody has looked for" in _of(run, OTHER).sentence
    assert "too short" in _of(run, SHORT).sentence
    assert "nobody has looked for" in _of(run, {"premise": "Unknown fields ask nothing."}).sentence


def test_a_corpus_that_is_not_the_runs_tells_nothing(
    run: Path, folder: Path, small_tokenizer: Tokenizer
) -> None:
    """Guards a claim about another corpus, a missing one and a damaged one."""
    corpus, kept = folder / "corpora" / "clean", folder / "kept"
    corpus.rename(kept)
    unknown = Contamination("sums", "")
    try:
        assert _of(run, *KNOWN) == unknown
        assert "not known" in unknown.sentence
        questions = folder / "questions.jsonl"
        build_corpus(
            [questions], corpus, tokenizer=small_tokenizer,
            screening=Screening(decontaminate=[str(folder / "texts.jsonl")]),
            limits=Limits(text_fields=("question",)),
        )  # fmt: skip
        assert _of(run, *KNOWN) == unknown
        shutil.rmtree(corpus)
        shutil.copytree(kept, corpus)
        (corpus / "decontaminated.bin").write_bytes(b"torn")
        assert _of(run, *KNOWN) == unknown
        (corpus / "decontaminated.bin").unlink()
        (corpus / "decontaminated.bin").mkdir()  # hours of evaluation must not end on it
        assert _of(run, *KNOWN) == unknown
        (corpus / "index.json").write_bytes(b"{")
        assert _of(run, *KNOWN) == unknown
    finally:
        shutil.rmtree(corpus, ignore_errors=True)
        kept.rename(corpus)
