"""Which corpus a model was trained on, where that can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from solollm.checkpoint import TrainerState, open_checkpoint
from solollm.data.stream import open_stream
from solollm.evaluation.held_out_text import run_corpus
from solollm.manifest import MANIFEST
from solollm.runs import Run


@dataclass(frozen=True)
class Trained:
    """`on_corpus`: None where nothing tells. `epochs`: passes over the training split."""

    on_corpus: bool | None
    epochs: float | None = None


def run_of(path: Path, checkpoint: Path) -> Run | None:
    """The run that `path` is, or whose checkpoint it is."""
    for place in (path, checkpoint.absolute().parent.parent):
        if (place / "run.toml").is_file():
            return Run.open(place)
    return None


def training(run: Run | None, checkpoint: Path, corpus: Path) -> Trained:
    """Whether the checkpoint was trained on this corpus, and how often on all of it. Nothing tells
    for a folder that is no run's, nor where two corpora took turns.

    Raises:
        IntegrityError: damaged checkpoint or corpus.
    """
    state = _state(checkpoint)
    if state is None or run is None or run.config.data.decay_corpus:
        return Trained(None)
    if run.config.finetune is not None:
        return Trained(None)
    plan = run.read_plan()
    seq_len, batch_size = plan.get("seq_len"), plan.get("batch_size")
    if type(seq_len) is not int or type(batch_size) is not int:
        return Trained(None)
    stream = open_stream(
        corpus, seq_len=seq_len, batch_size=batch_size, seed=run.config.train.seed,
        mask_documents=run.config.data.mask_documents,
    )  # fmt: skip
    if stream.fingerprint != state.data.fingerprint:
        return Trained(False)
    return Trained(True, state.step / stream.steps_per_epoch)


def trained_corpus(path: Path, checkpoint: Path) -> Path | None:
    """The corpus that a run's model has read and nothing beside it, if that is here and certain.

    Raises:
        IntegrityError: damaged checkpoint or corpus.
    """
    run = run_of(path, checkpoint)
    corpus = run_corpus(run) if run else None
    if corpus is None or not training(run, checkpoint, corpus).on_corpus:
        return None
    return corpus


def _state(checkpoint: Path) -> TrainerState | None:
    if not (checkpoint / MANIFEST).is_file():
        return None
    opened = open_checkpoint(checkpoint, verify="sizes")
    opened.close()
    return opened.state
