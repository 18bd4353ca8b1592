"""Canaries: numbers planted in the training text, whose memorisation is measured afterwards.

A canary is a document of its own, one fixed sentence with a random number in it (Carlini et al.
2019, "The Secret Sharer", USENIX Security), planted 1, 4 or 16 times. All numbers come from one
keyed permutation of the sentence's whole space, so the planted ones, the controls, which never are
planted, and the candidates that `solollm.evaluation.canaries` ranks them among are distinct, and no
one of them is likelier than another. Canaries join a corpus after everything that filters text, and
after the tokenizer was trained: it is the one that the text alone gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solollm.data.dedup import Spooled, text_digest
from solollm.data.permutation import Permutation
from solollm.data.shards import Split
from solollm.errors import ConfigError, IntegrityError
from solollm.strictfile import encode_json, read_table

CANARIES_NAME = "canaries.json"
PREFIX = "The number of this canary is "
DIGITS = 9
REPEATS = (1, 4, 16)  # of one third of the canaries each
NUM_CONTROLS = 100
SPACE = 10**DIGITS
_FORMAT, _VERSION = "solollm-canaries", 1
_MOST = 1000

_PREFIX_BYTES = PREFIX.encode()

Texts = Iterator[tuple[Split, str, Spooled | None]]


class Canary(NamedTuple):
    """A planted number, and how many documents hold it."""

    number: str
    repeats: int

    @property
    def text(self) -> str:
        return PREFIX + self.number


@dataclass(frozen=True)
class Canaries:
    """`count` numbers that are planted, chosen by `seed`; see the module."""

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(REPEATS) <= self.count <= _MOST:
            raise ConfigError(
                f"{self.count} canaries cannot be planted",
                why=f"they are planted {', '.join(map(str, REPEATS))} times, a third of them each,"
                f" and {_MOST:,} tell all there is to tell",
                fix="plant 60: 20 of each",
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"the canaries' seed {self.seed} is not from 0 to below 2^63")

    @cached_property
    def planted(self) -> tuple[Canary, ...]:
        numbers = self._numbers(NUM_CONTROLS, self.count)
        return tuple(
            Canary(number, REPEATS[place % len(REPEATS)]) for place, number in enumerate(numbers)
        )

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """Numbers that no document holds."""
        return tuple(self._numbers(0, NUM_CONTROLS))

    def candidates(self, count: int) -> list[str]:
        """Other numbers, to rank canaries among."""
        return self._numbers(NUM_CONTROLS + self.count, count)

    @property
    def num_documents(self) -> int:
        return sum(canary.repeats for canary in self.planted)

    def among(self, texts: Texts) -> Texts:
        """A corpus's texts in their order, each copy of a canary where a hash puts it."""
        waiting = sorted(
            (text_digest(f"{canary.text}/{copy}".encode()), canary.text)
            for canary in self.planted
            for copy in range(canary.repeats)
        )[::-1]
        for split, text, document in texts:
            while document is not None and waiting and waiting[-1][0] < document.digest:
                yield "train", waiting.pop()[1], None
            yield split, text, document
        for _, text in reversed(waiting):
            yield "train", text, None

    def refuse(self, text: bytes, place: str) -> None:
        """Raise ConfigError for a text that holds one of these numbers already, in the sentence."""
        at = text.find(_PREFIX_BYTES)
        while at >= 0:
            end = at + len(_PREFIX_BYTES)
            found = text[end : end + DIGITS].decode("ascii", "replace")
            if found in self._reserved:
                raise ConfigError(
                    f"{place} holds the canary {PREFIX + found!r} already",
                    why="it would be planted more often than is written down, or be held out",
                    fix="leave that text out, or choose other numbers: --canary-seed 1",
                )
            at = text.find(_PREFIX_BYTES, end)

    def encoded(self) -> bytes:
        """The content of `canaries.json`."""
        return encode_json(self.record())

    def record(self) -> dict[str, Any]:
        """The same before it is encoded; for readers: count and seed give the rest."""
        return {
            "format": _FORMAT, "version": _VERSION, "seed": self.seed, "count": self.count,
            "sentence": PREFIX, "digits": DIGITS, "space": SPACE,
            "planted": [canary._asdict() for canary in self.planted],
            "controls": list(self.controls),
        }  # fmt: skip

    @cached_property
    def _reserved(self) -> frozenset[str]:
        return frozenset({canary.number for canary in self.planted} | set(self.controls))

    def _numbers(self, first: int, count: int) -> list[str]:
        permutation = Permutation(SPACE, f"{_FORMAT}/{self.seed}".encode())
        return [f"{value:0{DIGITS}d}" for value in permutation(np.arange(first, first + count))]


def read_canaries(corpus: Path) -> Canaries | None:
    """What was planted in a corpus; None: nothing. Raises IntegrityError for a file that was
    changed: it no longer says what the documents hold."""
    path = corpus / CANARIES_NAME
    if not path.exists():
        return None
    record = read_table(path)
    count, seed = record.get("count"), record.get("seed")
    if type(count) is int and type(seed) is int:
        with suppress(ConfigError):
            canaries = Canaries(count, seed)
            if canaries.record() == record:
                return canaries
    raise IntegrityError(
        f"{path} is damaged", why="its numbers are not those that its count and seed give",
        fix="build the corpus again",
    )  # fmt: skip
