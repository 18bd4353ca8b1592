"""What a model has memorised: nothing is found in one that knows nothing, all in one that was made
to learn by heart, and in both cases the same on every measurement."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solollm.architecture import ModelConfig
from solollm.backend import Request
from solollm.cli import main
from solollm.completion import open_model
from solollm.config import RunConfig
from solollm.data.build import build_corpus
from solollm.data.canaries import Canaries, read_canaries
from solollm.data.shards import SplitReader
from solollm.errors import ConfigError, IntegrityError
from solollm.evaluation.canaries import CanaryGroup, CanaryResult
from solollm.evaluation.exposure import Exposure
from solollm.evaluation.memorisation import (
    Memorisation,
    MemorisationOptions,
    meaning,
    measure_memorisation,
)
from solollm.evaluation.verbatim import Reproduction, draw_passages, reproduce
from solollm.generation import generate
from solollm.horizon import updated
from solollm.packing import pack, unpack
from solollm.pretraining import pretrain
from solollm.resume_proof import tiny_config
from solollm.run_paths import with_paths_from
from solollm.runs import Run
from solollm.tokenizer import Tokenizer

pytest.importorskip("torch")
OPTIONS = MemorisationOptions(
    num_candidates=1000, num_passages=12, prefix_tokens=24, continuation_tokens=24, backend="torch"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def corpus(folder: Path, small_tokenizer: Tokenizer) -> Path:
    """Documents of random letters, which cannot be guessed, and nine canaries."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 100)) for _ in range(20)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / "texts.jsonl").write_text(lines)
    path = folder / "corpora" / "marked"
    build_corpus(
        [folder / "texts.jsonl"], path, tokenizer=small_tokenizer, validation_fraction=0.4,
        canaries=Canaries(9),
    )  # fmt: skip
    return path


def _config(corpus: Path, tokenizer: Tokenizer, steps: int) -> RunConfig:
    config = tiny_config(corpus, tokenizer.padded_vocab_size, steps)
    config = updated(config, "train", batch_size=16, micro_batch_size=16)
    config = updated(config, "checkpoint", every_steps=steps)
    config = updated(config, "log", every_steps=steps)
    return updated(config, "optimizer", lr=0.01)


@pytest.fixture(scope="module")
def parrot(folder: Path, corpus: Path, small_tokenizer: Tokenizer) -> Path:
    """A run that has read its small corpus twenty times."""
    run = folder / "runs" / "parrot"
    pretrain(_config(corpus, small_tokenizer, 80), run)
    return run


@pytest.fixture(scope="module")
def by_heart(parrot: Path) -> Memorisation:
    return measure_memorisation(parrot, OPTIONS)


@pytest.fixture(scope="module")
def untrained(
    folder: Path, corpus: Path, small_tokenizer: Tokenizer,
    save_telling: Callable[[Path, ModelConfig], Path],
) -> Path:  # fmt: skip
    """A run over the corpus whose checkpoint has random weights."""
    path = folder / "runs" / "untrained"
    config = _config(corpus, small_tokenizer, 10)
    Run.create(path, with_paths_from(config, path))
    assert config.model.config is not None
    save_telling(path / "checkpoints", config.model.config)
    return path


def test_nothing_is_found_in_a_model_that_knows_nothing(untrained: Path) -> None:
    """Exposures that come from the sentence, the rank's arithmetic or the order of scoring. Of a
    hundred uniform ranks the mean is 1.44 with a standard deviation of 0.15 (among a thousand
    candidates), and four of those are 0.6."""
    found = measure_memorisation(untrained, OPTIONS)
    assert found.canaries is not None
    controls, *planted = found.canaries.groups
    assert len(controls.exposures) == 100
    assert controls.mean == pytest.approx(1.44, abs=0.6)
    assert len({exposure.rank for exposure in controls.exposures}) > 80
    assert all(group.chance > 0.001 for group in planted)
    assert "no likelier" in found.meaning[0]
    assert "may be chance" in found.meaning[1]
    assert "not known here" in found.notes[1]


def test_what_was_learnt_by_heart_is_found(by_heart: Memorisation) -> None:
    """A measure that misses what it is made for, or that finds it in controls too."""
    assert by_heart.canaries is not None
    controls, once, four, sixteen = by_heart.canaries.groups
    assert controls.mean == pytest.approx(1.44, abs=0.6)
    assert controls.chance > 0.001
    assert [len(group.numbers) for group in (once, four, sixteen)] == [3, 3, 3]
    assert four.num_first == sixteen.num_first == 3
    assert once.mean > 4
    assert sixteen.mean == pytest.approx(by_heart.canaries.resolution)
    assert sixteen.extrapolated is not None
    assert sixteen.extrapolated > sixteen.mean
    train, unseen = by_heart.passages
    assert (train.split, unseen.split) == ("train", "validation")
    assert sum(length == 24 for length in train.matching) >= 3
    assert unseen.share == 0
    assert by_heart.document["corpus"]["trained_on"] is True
    assert by_heart.document["corpus"]["epochs"] == 20
    assert "left traces" in by_heart.meaning[0]
    assert "no proof of privacy" in by_heart.meaning[-1]


def test_the_command_says_the_same_again_and_stores_it(
    parrot: Path, corpus: Path, by_heart: Memorisation, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A result that depends on what ran before, or on where the corpus lies; a file that is not
    what was printed; `eval` taking the subcommand for a run."""
    (tmp_path / "elsewhere").symlink_to(corpus, target_is_directory=True)
    words = [
        "--corpus",
        str(tmp_path / "elsewhere"),
        "--candidates",
        "1000",
        "--passages",
        "12",
        "--prefix-tokens",
        "24",
    ]
    words += ["--continuation-tokens", "24", "--backend", "torch"]
    assert main(["eval", "memorisation", str(parrot), *words]) == 0
    shown = capsys.readouterr().out
    for part in ("never (controls)", "16 times", "held out", "no proof of privacy"):
        assert part in shown
    (stored,) = (parrot / "evaluations").iterdir()
    assert str(stored) in shown
    assert "-memorisation-" in stored.name
    document = json.loads(stored.read_text())
    first = json.loads(json.dumps(by_heart.document))
    for changing in ("time", "machine"):
        assert document.pop(changing)
        first.pop(changing)
    assert document == first


def test_greedy_continuations_are_what_generate_gives(parrot: Path, corpus: Path) -> None:
    """Leaving a request at its first wrong token must not change how many were right."""
    engine = open_model(parrot, backend="torch").engine
    passages = draw_passages(SplitReader(corpus, "train"), "train", 8, length=40, seed=1)
    requests = [Request(passage[:15].tolist(), 25) for passage in passages]
    wanted = []
    for passage, completion in zip(passages, generate(engine, requests), strict=True):
        equal = [a == b for a, b in zip(completion.ids, passage[15:].tolist(), strict=True)]
        wanted.append((*equal, False).index(False))
    assert reproduce(engine, passages, 15) == wanted
    assert len(set(wanted)) > 2


def test_passages_lie_in_one_document_and_nowhere_twice(corpus: Path) -> None:
    """A passage over a border asks for a document that nothing announces."""
    reader = SplitReader(corpus, "train")
    documents = [reader.document(n) for n in range(reader.record.documents)]
    for length in range(12, 24):  # some of which end where a document does
        drawn = draw_passages(reader, "train", 10_000, length=length, seed=0)
        assert len(drawn) >= 20
        for passage in drawn:
            assert reader.index.eos_id not in passage
            assert passage.tobytes() in b"|".join(ids.tobytes() for ids in documents)
    # Disjoint: random letters do not come again, and a canary is shorter than this.
    drawn = draw_passages(reader, "train", 10_000, length=45, seed=0)
    pieces = [passage[at : at + 22].tobytes() for passage in drawn for at in (0, 22)]
    assert len(set(pieces)) == len(pieces) >= 20
    again = draw_passages(reader, "train", 10, length=45, seed=0)
    other = draw_passages(reader, "train", 10, length=45, seed=1)
    assert [p.tolist() for p in again] == [p.tolist() for p in drawn[:10]]
    assert [p.tolist() for p in again] != [p.tolist() for p in other]
    assert draw_passages(reader, "train", 5, length=10**6, seed=0) == []


def test_canaries_travel_with_a_run(parrot: Path, corpus: Path, tmp_path: Path) -> None:
    """On the other machine the corpus would be one without canaries."""
    pack(parrot, tmp_path / "run.solo", backend="torch")
    unpack(tmp_path / "run.solo", tmp_path / "there")
    moved = tmp_path / "there" / "corpora" / corpus.name
    assert read_canaries(moved) == read_canaries(corpus) == Canaries(9)


def test_a_corpus_that_cannot_be_measured_on_is_said(
    parrot: Path, corpus: Path, folder: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Numbers that look like privacy where another corpus was measured."""

    def measure(path: Path, **changes: Any) -> Memorisation:
        return measure_memorisation(path, replace(OPTIONS, num_passages=4, **changes))

    loose = tmp_path / "loose"
    loose.symlink_to(next((parrot / "checkpoints").iterdir()), target_is_directory=True)
    with pytest.raises(ConfigError, match="is not known"):
        measure(loose)
    with pytest.raises(ConfigError, match="neither a run"):
        measure(tmp_path)
    with pytest.raises(ConfigError, match="not a built corpus"):
        measure(parrot, corpus=tmp_path)
    with pytest.raises(ConfigError, match="999 candidates"):
        measure(parrot, num_candidates=999)

    texts = folder / "texts.jsonl"
    build_corpus([texts], tmp_path / "words", vocab_size=300, canaries=Canaries(9))
    with pytest.raises(ConfigError, match="another tokenizer"):
        measure(parrot, corpus=tmp_path / "words")

    plain = tmp_path / "plain"
    build_corpus([texts], plain, tokenizer=small_tokenizer, validation_fraction=0.4)
    with pytest.raises(ConfigError, match="nothing to measure"):
        measure_memorisation(parrot, replace(OPTIONS, num_passages=0, corpus=plain))
    found = measure(parrot, corpus=plain)
    assert found.canaries is None
    assert len(found.meaning) == 2
    assert "another corpus than plain" in found.notes[1]
    assert "holds no canaries" in found.notes[2]

    moved = tmp_path / "moved"
    corpus.rename(moved)
    try:
        with pytest.raises(ConfigError, match="moved or deleted"):
            measure(parrot)
        shutil.copytree(plain, corpus)
        with pytest.raises(IntegrityError, match="is not the corpus that"):
            measure(parrot)
        shutil.rmtree(corpus)
    finally:
        moved.rename(corpus)


def _group(repeats: int, bits: float, count: int = 20) -> CanaryGroup:
    rank = 1 if bits >= 10 else 2
    return CanaryGroup(repeats, ("1",) * count, (Exposure(1.0, rank, bits, None),) * count)


def test_the_sentences_follow_the_figures() -> None:
    """A conclusion in words that the table does not bear."""
    cases = {
        (1.5, 1.0, 1.5, 1.0): "Planted numbers are no likelier to the model than numbers that it"
        " never saw.",
        (1.4, 1.4, 4.0, 10.0): "Numbers that the corpus holds 4 or 16 times left traces in the"
        " model, those that it holds once no measurable ones; 20 of 20 held 16 times are likelier"
        " to it than any of 1,000 others.",
        (1.4, 4.0, 1.4, 1.4): "Numbers that the corpus holds once left traces in the model, those"
        " that it holds 4 or 16 times no measurable ones.",
    }  # fmt: skip
    for (controls, *planted), sentence in cases.items():
        groups = [_group(n, bits) for n, bits in zip((1, 4, 16), planted, strict=True)]
        result = CanaryResult((_group(0, controls), *groups), 1000, 0, None)
        assert meaning(result, ())[0] == sentence
    tainted = CanaryResult((_group(0, 4.0), _group(1, 4.0)), 1000, 0, None)
    assert "say nothing" in meaning(tainted, ())[0]

    def passages(right: int, wrong: int) -> tuple[Reproduction, ...]:
        return (
            Reproduction("train", 5, 9, (9,) * right + (0,) * (40 - right)),
            Reproduction("validation", 5, 9, (9,) * wrong + (0,) * (40 - wrong)),
        )

    assert meaning(None, passages(20, 2))[0] == (
        "Of the training split's passages the model gives back 50.0% word for word, and 4.50 tokens"
        " on average before a wrong one, of held-out ones 5.0% and 0.45: it has memorised text."
    )
    assert "may be chance" in meaning(None, passages(5, 2))[0]
    assert "may be chance" in meaning(None, passages(2, 20))[0]
    assert len(meaning(None, passages(1, 1)[:1])) == 1
