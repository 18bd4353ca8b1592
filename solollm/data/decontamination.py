"""Texts that hold items of a benchmark out of a corpus, so that its score means something.

A text holds an item if 13 words in a row of it are there (Brown et al. 2020, arXiv:2005.14165,
appendix C), or, of an item of 8 to 12 words, all of it. Case, punctuation and blanks do not count.
Shorter items cannot be told from other text. A run that more than ten different items share is how
the benchmark asks, not what, and does not count, as there; an item of such runs alone cannot be
looked for.

The index holds 30 to 50 bytes per word of the benchmark. What was looked for stays with the corpus
as hashes (`looked_for`), so that an evaluation can say so of its very items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from solollm.data.benchmark_items import read_items
from solollm.data.cleaning import normalised_where_sound
from solollm.data.items import excerpt
from solollm.data.records import Records
from solollm.data.screening import LeftOut
from solollm.data.shingles import Runs, split_words
from solollm.errors import IntegrityError, printable
from solollm.strictfile import read_bytes

CONTAMINATION_NAME = "contamination.jsonl"
LOOKED_FOR_NAME = "decontaminated.bin"
WORDS, LEAST_WORDS = 13, 8
_COMMON = 10  # items that share a run: above, it is a phrase of the benchmark
_PARTS = ("test", "validation", "val", "dev", "train")
_MOST_BYTES = 1 << 30  # of the list of hashes
_ROOM = 16  # entries of the filter per run: most runs of a text are ruled out by one look


class Decontaminated(BaseModel):
    """What was looked for of one benchmark, and what of it was found: `items` are different ones,
    without those `too_short` or `too_common` to be looked for; `found` counts items, `texts` the
    texts that held one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    items: int
    too_short: int
    too_common: int = 0
    found: int = 0
    texts: int = 0


class _Width(NamedTuple):
    """Runs of one width: their hashes ascending, the item of each, and which hashes may be there by
    their first bits."""

    runs: np.ndarray  # uint64
    items: np.ndarray  # uint32
    is_likely: np.ndarray  # bool [a power of two]


class ItemIndex:
    """Finds the items of a benchmark in texts. Equal items are one."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.beginnings: list[str] = []
        self.num_too_short = 0
        digests: dict[int, int] = {}  # of an item -> its number
        runs: dict[int, list[np.ndarray]] = {}
        numbers: dict[int, list[np.ndarray]] = {}
        for text in texts:
            hashes = _words(text)
            if len(hashes) < LEAST_WORDS:
                self.num_too_short += 1
                continue
            number = len(digests)
            if digests.setdefault(_digest(hashes), number) != number:
                continue
            width = min(WORDS, len(hashes))
            found = np.unique(Runs(hashes).of(width))
            runs.setdefault(width, []).append(found)
            numbers.setdefault(width, []).append(np.full(len(found), number, np.uint32))
            self.beginnings.append(excerpt(text))
        self._widths = {
            width: _indexed(np.concatenate(runs[width]), np.concatenate(numbers[width]))
            for width in sorted(runs)
        }
        kept = [index.items for index in self._widths.values()]
        findable = set(np.unique(np.concatenate(kept)).tolist()) if kept else set()
        self.digests = [digest for digest, number in digests.items() if number in findable]

    @property
    def num_items(self) -> int:
        """Those that can be found."""
        return len(self.digests)

    @property
    def num_too_common(self) -> int:
        """Those of which every run is one that many items share."""
        return len(self.beginnings) - len(self.digests)

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
        first = self._indices[name].beginnings[int(items[0])]
        counts: Counter[str] = Counter()
        for benchmark, found in held.items():
            counts[_shown(benchmark)] += len(found)
        self.records.add({"source": source, "place": place, "items": counts, "first": first})
        return LeftOut("benchmark item", f"{_shown(name)}: {first[:60]}")

    def report(self) -> tuple[Decontaminated, ...]:
        return tuple(
            Decontaminated(
                source=_shown(source), items=index.num_items, too_short=index.num_too_short,
                too_common=index.num_too_common, found=len(self._found[source]),
                texts=self._num_texts[source],
            )
            for source, index in self._indices.items()
        )  # fmt: skip

    def looked_for(self) -> bytes:
        """The content of `decontaminated.bin`: little-endian uint64, ascending, one per item."""
        return encode_digests(chain.from_iterable(i.digests for i in self._indices.values()))


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
        hashes = _words(text)
        if len(hashes) < LEAST_WORDS:
            counts[2] += 1
        else:
            counts[_digest(hashes) not in known] += 1
    return LookedFor(*counts)


@dataclass(frozen=True)
class Overlap:
    """What training text holds of one benchmark: `held`, item -> number of texts, for those that
    one holds. `num_items` are different ones that can be found."""

    source: str
    beginnings: Sequence[str]
    num_items: int
    num_too_short: int
    num_too_common: int
    held: Mapping[int, int]


def measure_overlap(sources: Sequence[str], texts: Iterable[str]) -> tuple[Overlap, ...]:
    """Which items of benchmarks the texts hold. Raises as `read_items` does."""
    indices = {source: ItemIndex(read_items(source)) for source in sources}
    held: dict[str, Counter[int]] = {source: Counter() for source in sources}
    for text in texts:
        runs = Runs(_words(text))
        for source, index in indices.items():
            held[source].update(index.find(runs).tolist())
    return tuple(
        Overlap(
            _shown(source), index.beginnings, index.num_items, index.num_too_short,
            index.num_too_common, held[source],
        )
        for source, index in indices.items()
    )  # fmt: skip


def _words(text: str) -> np.ndarray:
    """uint64 [words] of a text that is no corpus's yet, spelt as one's are."""
    return split_words(normalised_where_sound(text)).hashes


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
    if not path.exists():
        return frozenset()
    content = read_bytes(path, max_bytes=_MOST_BYTES)
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
    name = f"{path.parent.name}/{path.name}" if says_little else path.name
    return " ".join(printable(name).split())  # a file's name may hold any bytes
