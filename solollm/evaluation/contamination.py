"""Whether a model can have read what it is asked: what the build of its corpus looked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solollm.data.benchmark_items import item_text
from solollm.data.decontamination import looked_for
from solollm.errors import SoloLLMError
from solollm.evaluation.trained_corpus import trained_corpus


@dataclass(frozen=True)
class Contamination:
    """Of one benchmark's items: those whose texts the corpus was built without, those that nobody
    looked for, and those too short to be looked for. `corpus`: "", where it is not known."""

    benchmark: str
    corpus: str
    looked_for: int = 0
    not_looked_for: int = 0
    too_short: int = 0

    @property
    def sentence(self) -> str:
        if not self.corpus:
            return (
                f"{self.benchmark}: whether the model has read these items in training is not known"
                " here"
            )
        total = self.looked_for + self.not_looked_for
        are = "one is" if self.too_short == 1 else f"{self.too_short:,} are"
        short = f" ({are} too short to be looked for)" if self.too_short else ""
        if not total:
            return f"{self.benchmark}: its items are too short to be looked for in training text"
        if not self.looked_for:
            return (
                f"{self.benchmark}: nobody has looked for these items in the training text; measure"
                " it with `solollm data contamination`, or build with --decontaminate"
            )
        if not self.not_looked_for:
            return (
                f"{self.benchmark}: {self.corpus} was built without texts that hold one of these"
                f" {total:,} items{short}"
            )
        return (
            f"{self.benchmark}: {self.corpus} was built without texts that hold one of"
            f" {self.looked_for:,} of these items; {self.not_looked_for:,} nobody looked for"
            f"{short}"
        )


def contamination(
    path: Path, checkpoint: Path, items: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[Contamination, ...]:
    """What is known of each benchmark, given the rows of its items."""
    try:
        corpus = trained_corpus(path, checkpoint)
        return tuple(_of(name, rows, corpus) for name, rows in items.items())
    except (SoloLLMError, OSError):  # a damaged corpus: what it held is not known, scores stay
        return tuple(Contamination(name, "") for name in items)


def _of(name: str, rows: Sequence[Mapping[str, Any]], corpus: Path | None) -> Contamination:
    if corpus is None:
        return Contamination(name, "")
    texts = [text for text in map(item_text, rows) if text is not None]
    found = looked_for(corpus, texts)
    unasked = found.not_looked_for + len(rows) - len(texts)  # rows of fields that are not known
    return Contamination(name, corpus.resolve().name, *found._replace(not_looked_for=unasked))
