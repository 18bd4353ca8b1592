"""`solollm eval memorisation` as a function: what of its corpus a model gives away.

Two measures: the exposure of canaries, where the corpus holds any, and how much of its training
text the model continues verbatim. Each stands beside a control that the model has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from solollm.backend import ComputeDType, EngineOptions
from solollm.completion import TextModel, find_checkpoint, open_model
from solollm.data.canaries import read_canaries
from solollm.data.inspection import corpus_tokenizer
from solollm.data.shards import SPLITS, CorpusIndex, SplitReader, read_index
from solollm.errors import ConfigError, IntegrityError
from solollm.evaluation.canaries import CanaryResult, measure_canaries
from solollm.evaluation.held_out_text import run_corpus
from solollm.evaluation.report import compute_dtype, describe_setting, save_document
from solollm.evaluation.trained_corpus import Trained, run_of, training
from solollm.evaluation.verbatim import Reproduction, draw_passages, reproduce
from solollm.registry import select_backend
from solollm.runs import Run

Tell = Callable[[str, int, int], None]
# With fewer, their own chance would count beside that of a hundred controls.
LEAST_CANDIDATES = 1000
UNLIKELY = 0.001  # what never-planted numbers come to less often than this is called memorised


@dataclass(frozen=True)
class MemorisationOptions:
    """`corpus`: none, the run's own. A passage is `prefix_tokens` that are given and
    `continuation_tokens` that are to come; shorter where the model's context is. `num_passages` 0:
    none are continued. `dtype` as in `EvalOptions`."""

    corpus: Path | None = None
    num_candidates: int = 4096
    num_passages: int = 200
    prefix_tokens: int = 50
    continuation_tokens: int = 50
    seed: int = 0
    backend: str = "auto"
    batch_size: int = 8
    dtype: ComputeDType | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Memorisation:
    """What was measured. `canaries`: None where the corpus holds none."""

    checkpoint: Path
    canaries: CanaryResult | None
    passages: tuple[Reproduction, ...]
    document: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def meaning(self) -> tuple[str, ...]:
        """In sentences; the last one is what this cannot say."""
        return meaning(self.canaries, self.passages)

    def save(self) -> Path:
        """Write the file where `solollm eval` writes its own. Raises StorageError."""
        return save_document(self.checkpoint, self.document, kind="memorisation")


def measure_memorisation(
    path: Path,
    options: MemorisationOptions = MemorisationOptions(),
    *,
    tell: Tell = lambda kind, done, total: None,
) -> Memorisation:
    """Measure the model of a run (its newest intact checkpoint) or of a checkpoint folder.

    Raises:
        ConfigError: no corpus is known or found, nothing to measure on it, or another tokenizer's.
        IntegrityError: damaged weights or corpus, or a run's corpus that is not what it was.
        BackendError: no backend can run here.
    """
    _check(options)
    checkpoint, _ = find_checkpoint(path)
    run = run_of(path, checkpoint)
    corpus = _find_corpus(path, run, options.corpus)
    index, canaries = read_index(corpus), read_canaries(corpus)
    if canaries is None and not options.num_passages:
        raise ConfigError(
            f"nothing to measure on {corpus}", why="it holds no canaries, and no passage is wanted",
            fix="leave --passages out, or build a corpus with canaries:"
            " solollm data build SOURCES --out FOLDER --canaries 60",
        )  # fmt: skip
    trained = training(run, checkpoint, corpus)
    if trained.on_corpus is False and options.corpus is None and run and not run.config.finetune:
        raise IntegrityError(
            f"{corpus} is not the corpus that {run.path} was trained on",
            why="it was built again: the data's fingerprint is not the one that the checkpoint has",
            fix="give the one that it was: --corpus FOLDER",
        )
    selected = select_backend(options.backend)
    dtype = compute_dtype(selected.backend, options.dtype)
    model = open_model(
        path, backend=options.backend,
        options=EngineOptions(max_batch_size=options.batch_size, compute_dtype=dtype),
    )  # fmt: skip
    _require_tokenizer(model, corpus)
    result = None
    if canaries is not None:
        result = measure_canaries(model, canaries, num_candidates=options.num_candidates, tell=tell)
    passages = _passages(model, corpus, options, tell) if options.num_passages else ()
    setting = describe_setting(model, selected.backend, batch_size=options.batch_size, dtype=dtype)
    document = {
        **setting, "seed": options.seed, "corpus": _describe_corpus(corpus, index, trained),
        "canaries": result.document() if result else None,
        "passages": [reproduction.document() for reproduction in passages],
        "meaning": meaning(result, passages),
    }  # fmt: skip
    notes = (
        *model.notes[:-1], selected.reason, *_training_notes(corpus, trained),
        *_measured_notes(corpus, result, passages, options.num_passages),
    )  # fmt: skip
    return Memorisation(checkpoint, result, passages, document, notes)


def meaning(canaries: CanaryResult | None, passages: tuple[Reproduction, ...]) -> tuple[str, ...]:
    """What the figures say, one sentence each, and what they do not."""
    told = []
    if canaries is not None:
        told.append(_canaries_mean(canaries))
    by_split = {reproduction.split: reproduction for reproduction in passages}
    if len(by_split) == len(SPLITS):
        train, unseen = by_split["train"], by_split["validation"]
        more = train.mean_matching_interval[0] > unseen.mean_matching_interval[1]
        more = more or train.interval[0] > unseen.interval[1]
        told.append(
            f"Of the training split's passages the model gives back {train.share:.1%} word for"
            f" word, and {train.mean_matching:.2f} tokens on average before a wrong one, of"
            f" held-out ones {unseen.share:.1%} and {unseen.mean_matching:.2f}: "
            + ("it has memorised text." if more else "the difference may be chance.")
        )
    told.append(
        "What was not found may still be there: other prompts, more of them or more training may"
        " bring text out, so this is no proof of privacy."
    )
    return tuple(told)


def _canaries_mean(result: CanaryResult) -> str:
    controls, *planted = result.groups
    if controls.chance < UNLIKELY:
        return (
            "The model knows numbers that were never planted, so the canaries say nothing: was it"
            " trained on other text with canaries of the same seed?"
        )
    known = [group.repeats for group in planted if group.chance < UNLIKELY]
    unknown = [group.repeats for group in planted if group.chance >= UNLIKELY]
    if not known:
        return "Planted numbers are no likelier to the model than numbers that it never saw."
    sentence = f"Numbers that the corpus holds {_times(known)} left traces in the model"
    if unknown:
        sentence += f", those that it holds {_times(unknown)} no measurable ones"
    first = [
        f"{group.num_first} of {len(group.numbers)} held {_times([group.repeats])}"
        for group in planted
        if 2 * group.num_first >= len(group.numbers)
    ]
    if first:
        sentence += (
            f"; {_and(first)} are likelier to it than any of {result.num_candidates:,} others"
        )
    return sentence + "."


def _and(words: list[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _times(repeats: list[int]) -> str:
    words = ["once" if count == 1 else str(count) for count in repeats]
    if repeats[-1] > 1:
        words[-1] += " times"
    return _and(words, "or")


def _check(options: MemorisationOptions) -> None:
    for name, value, least in (
        ("candidates", options.num_candidates, LEAST_CANDIDATES),
        ("passages", options.num_passages, 0),
        ("prefix tokens", options.prefix_tokens, 1),
        ("continuation tokens", options.continuation_tokens, 1),
    ):  # fmt: skip
        if not least <= value <= 10_000_000:
            raise ConfigError(f"{value:,} {name}", fix=f"give {least:,} to 10,000,000")


def _find_corpus(path: Path, run: Run | None, asked: Path | None) -> Path:
    fix = "say where the corpus is: --corpus FOLDER"
    if asked is not None:
        return asked
    if run is None:
        raise ConfigError(
            f"the corpus of {path} is not known", why="it belongs to no run that names one", fix=fix
        )
    if run.config.finetune is not None:
        raise ConfigError(
            f"{run.path} was tuned on samples, not on a corpus",
            why="what is measured is memorised text of a corpus, such as its base's",
            fix=fix,
        )
    corpus = run_corpus(run)
    if corpus is None:
        named = run.path.resolve() / run.config.data.corpus
        raise ConfigError(
            f"the corpus of {run.path} is not at {named.resolve()}", why="it was moved or deleted",
            fix=fix,
        )  # fmt: skip
    return corpus


def _require_tokenizer(model: TextModel, corpus: Path) -> None:
    if corpus_tokenizer(corpus).digest != model.tokenizer.digest:
        raise ConfigError(
            f"{corpus} has another tokenizer than {model.checkpoint}",
            why="so the model was not trained on it",
            fix="give the corpus that it was trained on: --corpus FOLDER",
        )


def _passages(
    model: TextModel, corpus: Path, options: MemorisationOptions, tell: Tell
) -> tuple[Reproduction, ...]:
    """Of both splits; not of one that holds no passage."""
    prefix = min(options.prefix_tokens, model.max_seq_len // 2)
    new = min(options.continuation_tokens, model.max_seq_len - prefix)
    found = []
    for split in SPLITS:
        reader = SplitReader(corpus, split)
        drawn = draw_passages(
            reader, split, options.num_passages, length=prefix + new, seed=options.seed
        )
        if drawn:
            matching = reproduce(
                model.engine, drawn, prefix, tell=partial(tell, f"{split} passages")
            )
            found.append(Reproduction(split, prefix, new, tuple(matching)))
    return tuple(found)


def _describe_corpus(corpus: Path, index: CorpusIndex, trained: Trained) -> dict[str, Any]:
    return {
        "name": corpus.resolve().name, "fingerprint": index.fingerprint,
        "trained_on": trained.on_corpus, "epochs": trained.epochs,
    }  # fmt: skip


def _training_notes(corpus: Path, trained: Trained) -> list[str]:
    if trained.on_corpus is None:
        return [f"whether this model was trained on {corpus.name} is not known here"]
    if not trained.on_corpus:
        return [f"this run was trained on another corpus than {corpus.name}"]
    if trained.epochs is not None and trained.epochs < 1:
        return [
            f"the model has read {trained.epochs:.0%} of its corpus so far: what it has not read it"
            " cannot have memorised"
        ]
    return []


def _measured_notes(
    corpus: Path, canaries: CanaryResult | None, passages: tuple[Reproduction, ...], wanted: int
) -> list[str]:
    notes = []
    if canaries is None:
        notes.append(
            f"{corpus.name} holds no canaries; one with them: `solollm data build SOURCES --out"
            " FOLDER --canaries 60`"
        )
    found = {reproduction.split: len(reproduction.matching) for reproduction in passages}
    for split in SPLITS if wanted else ():
        if found.get(split, 0) < wanted:
            notes.append(f"the {split} split has {found.get(split, 0)} passages, not {wanted}")
    return notes
