"""The corpora that a mixture is made of: named with their weights, checked, and opened.

What becomes of them is `solollm.data.mixing`'s concern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solollm.data.build import Progress
from solollm.data.canaries import CANARIES_NAME
from solollm.data.placement import check_out
from solollm.data.shards import (
    SPLITS,
    TOKENIZER_FOLDER,
    CorpusIndex,
    Split,
    SplitReader,
    read_index,
    verify_corpus,
)
from solollm.errors import ConfigError, quoted


class Part(NamedTuple):
    """A built corpus and its weight among the others."""

    corpus: Path
    weight: float = 1.0


def parse_part(text: str) -> Part:
    """`FOLDER=WEIGHT`, or `FOLDER` alone for weight 1. A folder of that whole name comes first.

    Raises:
        ConfigError: what follows the last `=` is no number.
    """
    folder, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return Part(Path(text))
    try:
        return Part(Path(folder), float(weight))
    except ValueError as error:
        raise ConfigError(
            f"the weight {weight!r} of {folder} is no number", fix="give CORPUS=0.3, or CORPUS"
        ) from error


@dataclass(frozen=True)
class OpenPart:
    """One part, checked and open. `share` is of 1."""

    corpus: Path
    share: Fraction
    index: CorpusIndex
    readers: Mapping[Split, SplitReader]

    @property
    def name(self) -> str:
        return self.corpus.resolve().name

    @property
    def num_documents(self) -> int:
        return sum(reader.record.documents for reader in self.readers.values())

    @property
    def num_bytes(self) -> int:
        """Of its tokens."""
        itemsize = np.dtype(self.index.dtype).itemsize
        return itemsize * sum(reader.record.tokens for reader in self.readers.values())


def check_folders(corpora: Sequence[Path], out: Path, *, overwrite: bool) -> None:
    if not corpora:
        raise ConfigError("there is nothing to mix", fix="name at least one built corpus")
    check_out(out, [str(corpus) for corpus in corpora], overwrite=overwrite)
    for corpus in corpora:
        if out.resolve() in corpus.resolve().parents:
            raise ConfigError(
                f"the corpus {corpus} lies inside the output {out}",
                why="it would go with what is replaced",
                fix="choose an output folder elsewhere",
            )
        if (corpus / CANARIES_NAME).exists():
            raise ConfigError(
                f"{corpus} holds canaries",
                why="mixed, they would be there more or less often than is written down",
                fix="mix the corpus without them: build it without --canaries",
            )


def open_parts(parts: Sequence[Part]) -> list[OpenPart]:
    """The parts in an order of their contents: of documents in several, the smallest corpus keeps
    them, which would else be left with few of its own."""
    for corpus, weight in parts:
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"the weight of {corpus} is {weight:g}", fix="give a number above 0, such as 0.3"
            )
    total = sum(Fraction(part.weight) for part in parts)
    inputs = [
        OpenPart(
            corpus, Fraction(weight) / total, read_index(corpus),
            {split: SplitReader(corpus, split) for split in SPLITS},
        )
        for corpus, weight in parts
    ]  # fmt: skip
    for one, other in combinations(inputs, 2):
        if one.index.fingerprint == other.index.fingerprint:
            raise ConfigError(
                f"{one.corpus} and {other.corpus} are the same corpus",
                why=f"both have the fingerprint {one.index.fingerprint}",
                fix="name it once, with the sum of the weights",
            )
    for other in inputs[1:]:
        _check_tokenizer(other, inputs[0])
    return sorted(inputs, key=lambda i: (i.readers["train"].record.tokens, i.index.fingerprint))


def _check_tokenizer(part: OpenPart, like: OpenPart) -> None:
    ours, theirs = (
        (i.tokenizer_digest, i.vocab_size, i.bos_id, i.eos_id) for i in (part.index, like.index)
    )
    if ours != theirs:
        raise ConfigError(
            f"{part.corpus} and {like.corpus} have different tokenizers",
            why="the same ids would stand for different texts",
            fix="build one with the tokenizer of the other: solollm data build SOURCES --tokenizer"
            f" {quoted(like.corpus / TOKENIZER_FOLDER)} --out {quoted(part.corpus)} --overwrite",
        )


def verify_parts(inputs: Sequence[OpenPart], tell: Callable[[Progress], None]) -> None:
    done, total = 0, sum(part.num_bytes for part in inputs)
    tell(Progress("checking", 0, total))
    for part in inputs:
        verify_corpus(part.corpus)
        done += part.num_bytes
        tell(Progress("checking", done, total))
