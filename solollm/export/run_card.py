"""The model card of a run, before or without an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from solollm.adapters import BASE
from solollm.checkpoint import open_checkpoint
from solollm.completion import find_checkpoint
from solollm.export.card import CardFacts, model_card, read_training
from solollm.rounding import DTYPE_NAMES, common_dtype
from solollm.runs import Run
from solollm.tensorfile import open_weights


def run_card(
    run: Path, *, name: str = "", licence: str = "", languages: tuple[str, ...] = (),
    tell: Callable[[str], object] = lambda note: None,
) -> str:  # fmt: skip
    """The card of a run's newest intact checkpoint, in Markdown, as an export would hold it.

    Args:
        name: of the model; default: the run's.
        licence, languages: as the Hugging Face hub spells them, such as "apache-2.0" and "en".
        tell: hears of damaged checkpoints that were passed over.

    Raises:
        ConfigError: no run there, or none with a checkpoint.
        IntegrityError: damaged files.
    """
    opened = Run.open(run)
    folder, notes = find_checkpoint(run)
    for note in notes:
        tell(note)
    checkpoint = open_checkpoint(folder, verify="sizes")
    try:
        is_adapter = (folder / BASE).is_file()
        return model_card(
            CardFacts(
                name=" ".join((name or opened.path.resolve().name).split()),
                model=checkpoint.model,
                target="peft" if is_adapter else "hf",
                weights="float32 factors, the base beside them" if is_adapter else _weights(folder),
                training=read_training(opened.path, checkpoint.state),
                checkpoint=folder.name,
                digest=checkpoint.certificate.digest,
                adapter=checkpoint.adapter,
                licence=licence,
                languages=languages,
            )
        )
    finally:
        checkpoint.close()


def _weights(folder: Path) -> str:
    weights = open_weights(folder)
    try:
        return DTYPE_NAMES[common_dtype({weights.info(name).dtype for name in weights.names()})]
    finally:
        weights.close()
