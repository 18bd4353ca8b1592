"""Texts that hold items of a benchmark out of a corpus, so that its score means something.

A text holds an item if 13 words in a row of it are there (Brown et al. 2020, arXiv:2005.14165,
appendix C), or, of an item of 8 to 12 words, all of it. Case, punctuation and blanks do not count.
Shorter items cannot be told from other text. A run that more than ten items share is how the
benchmark asks, not what, and does not count, as there.

The index holds 30 to 50 bytes per word of the benchmark. What was looked for stays with the corpus
as hashes (`looked_for`), so that an evaluation can say so of its very items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from solollm.data.benchmark_items import read_items
from solollm.data.items import excerpt
from solollm.data.records import Records
from solollm.data.screening import LeftOut
from solollm.data.shingles import Runs, split_words
from solollm.errors import IntegrityError

CONTAMINATION_NAME = "contamination.jsonl"
LOOKED_FOR_NAME = "decontaminated.bin"
WORDS, LEAST_WORDS = 13, 8
_COMMON = 10  # items that share a run: above, it is a phrase of the benchmark
_PARTS = ("test", "validation", "val", "dev", "train")
_ROOM = 16  # entries of the filter per run: most runs of a text are ruled out by one look


class Decontaminated(BaseModel):
    """What was looked for of one benchmark, and what of it was found. `too_short` items are not
    among `items`; `found` counts items, `texts` the texts that held one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    items: int
    too_short: int
    found: int = 0
    texts: int = 0


class _Width(NamedTuple):
    """Runs of one width: their hashes ascending, the item of each, and which hashes may be there by
    their first bits."""

    runs: np.ndarray  # uint64
    items: np.ndarray  # uint32
    is_likely: np.ndarray  # bool [a power of two]


class ItemIndex:
    """Finds the items of a benchmark in texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.items: list[str] = []  # the beginnings
        self.num_too_short = 0
        digests: list[int] = []
        runs: dict[int, list[np.ndarray]] = {}
        numbers: dict[int, list[np.ndarray]] = {}
        for text in texts:
            hashes = split_words(text).hashes
            if len(hashes) < LEAST_WORDS:
                self.num_too_short += 1
                continue
            width = min(WORDS, len(hashes))
            found = np.unique(Runs(hashes).of(width))
            runs.setdefault(width, []).append(found)
            numbers.setdefault(width, []).append(np.full(len(found), len(self.items), np.uint32))
            digests.append(_digest(hashes))
            self.items.append(excerpt(text))
        self.digests = np.unique(np.array(digests, np.uint64))
        self._widths = {
            width: _indexed(np.concatenate(runs[width]), np.concatenate(numbers[width]))
            for width in sorted(runs)
        }

    def find(self, runs: Runs) -> np.ndarray:
        """The numbers of the items that a text of these runs holds, ascending."""
        held = []
        for width, index in self._widths.items():
            hashes = runs.of(width)
            hashes = np.unique(hashes[index.is_likely[_first_bits(hashes, index.is_likely)]])
            first = np.searchsorted(index.runs, hashes, side="left")
            last = np.searchsorted(index.runs, hashes, side="right")
            for place in np.nonzero(first < last)[0]:
                held.append(index.items[first[place] : last[place]])
        return np.unique(np.concatenate(held)) if held else np.empty(0, np.uint32)


class Decontamination:
    """The screen of one build, and its record."""

    def __init__(self, sources: Sequence[str], records: Records) -> None:
        """Reads the benchmarks. Raises as `read_items` does."""
        self.records = records
        self._indices = {source: ItemIndex(read_items(source)) for source in sources}
        self._found: dict[str, set[int]] = {source: set() for source in sources}
        self._num_texts = dict.fromkeys(sources, 0)

    def take(self, text: str, source: str, place: str) -> str | LeftOut:
        runs = Runs(split_words(text).hashes)
        held = {name: index.find(runs) for name, index in self._indices.items()}
        held = {name: items for name, items in held.items() if len(items)}
        if not held:
            return text
        for name, items in held.items():
            self._found[name].update(items.tolist())
            self._num_texts[name] += 1
        name, items = next(iter(held.items()))
        first = self._indices[name].items[int(items[0])]
        self.records.add(
            {
                "source": source, "place": place,
                "items": {_shown(name): len(items) for name, items in held.items()},
                "first": first,
            }
        )  # fmt: skip
        return LeftOut("benchmark item", f"{_shown(name)}: {first[:60]}")

    def report(self) -> tuple[Decontaminated, ...]:
        return tuple(
            Decontaminated(
                source=_shown(source), items=len(index.items), too_short=index.num_too_short,
                found=len(self._found[source]), texts=self._num_texts[source],
            )
            for source, index in self._indices.items()
        )  # fmt: skip

    def looked_for(self) -> bytes:
        """The content of `decontaminated.bin`: little-endian uint64, ascending, one per item."""
        digests = [index.digests for index in self._indices.values()]
        return encode_digests(np.concatenate(digests).tolist())


class LookedFor(NamedTuple):
    """Of a benchmark's items: those that were looked for in the texts of a corpus, those that were
    not, and those that cannot be."""

    looked_for: int
    not_looked_for: int
    too_short: int


def looked_for(corpus: Path, texts: Iterable[str]) -> LookedFor:
    """Which of these items the build of a corpus looked for. Raises IntegrityError."""
    known = read_digests(corpus)
    counts = [0, 0, 0]
    for text in texts:
        hashes = split_words(text).hashes
        if len(hashes) < LEAST_WORDS:
            counts[2] += 1
        else:
            counts[_digest(hashes) not in known] += 1
    return LookedFor(*counts)


@dataclass(frozen=True)
class Overlap:
    """What a corpus's training text holds of one benchmark: `held`, item -> number of documents,
    for those that one holds; `beginnings` of all items."""

    source: str
    beginnings: Sequence[str]
    num_too_short: int
    held: Mapping[int, int]


def measure_overlap(
    sources: Sequence[str],
    texts: Iterable[str],
) -> tuple[Overlap, ...]:
    """Which items of benchmarks the texts hold. Raises as `read_items` does."""
    indices = {source: ItemIndex(read_items(source)) for source in sources}
    held: dict[str, Counter[int]] = {source: Counter() for source in sources}
    for text in texts:
        runs = Runs(split_words(text).hashes)
        for source, index in indices.items():
            held[source].update(index.find(runs).tolist())
    return tuple(
        Overlap(_shown(source), index.items, index.num_too_short, held[source])
        for source, index in indices.items()
    )


def _digest(hashes: np.ndarray) -> int:
    """Of all words of an item, one after the other."""
    return int(Runs(hashes).of(len(hashes))[0])


def _indexed(runs: np.ndarray, items: np.ndarray) -> _Width:
    order = np.argsort(runs, kind="stable")
    runs, items = runs[order], items[order]
    _, which, counts = np.unique(runs, return_inverse=True, return_counts=True)
    stays = counts[which] <= _COMMON
    runs, items = runs[stays], items[stays]
    is_likely = np.zeros(1 << (_ROOM * len(runs)).bit_length(), bool)
    is_likely[_first_bits(runs, is_likely)] = True
    return _Width(runs, items, is_likely)


def _first_bits(hashes: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Where a hash stands in a table of a power of two of entries."""
    return hashes >> np.uint64(65 - len(table).bit_length())


def encode_digests(digests: Iterable[int]) -> bytes:
    """The content of `decontaminated.bin`."""
    return np.array(sorted(set(digests)), "<u8").tobytes()


def read_digests(corpus: Path) -> frozenset[int]:
    """What `decontaminated.bin` holds; nothing, where there is none. Raises IntegrityError."""
    path = corpus / LOOKED_FOR_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return frozenset()
    digests = np.frombuffer(content[: len(content) // 8 * 8], "<u8")
    if len(content) % 8 or (digests[1:] <= digests[:-1]).any():
        raise IntegrityError(
            f"{path} is damaged", why="it is no ascending list of hashes",
            fix="build the corpus again",
        )  # fmt: skip
    return frozenset(digests.tolist())


def _shown(source: str) -> str:
    """Without the path that leads to it, but for the folder of files that are named alike."""
    if "://" in source:
        return source
    path = Path(source).resolve()
    says_little = path.stem in _PARTS and path.parent != Path.home()
    return f"{path.parent.name}/{path.name}" if says_little else path.name
