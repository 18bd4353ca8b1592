"""One corpus out of several: each gives its share of the training tokens.

The result follows from contents, weights and the number of tokens alone: not from where the
corpora lie or in what order they are named. What is taken, how often and in what order is decided
in `solollm.data.shares`. Held at once are about 150 bytes per document, one block of tokens, and
never a text; documents are read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from solollm.data.build import Progress
from solollm.data.decontamination import (
    LOOKED_FOR_NAME,
    Decontaminated,
    encode_digests,
    read_digests,
)
from solollm.data.inspection import corpus_tokenizer
from solollm.data.items import excerpt
from solollm.data.parts import OpenPart, Part, check_folders, open_parts, verify_parts
from solollm.data.placement import swept
from solollm.data.report import (
    REPORT_NAME,
    Cause,
    CorpusReport,
    Example,
    LongDocument,
    PartReport,
    SourceReport,
    SplitReport,
    read_report,
)
from solollm.data.shards import (
    INDEX_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    CorpusIndex,
    Split,
    SplitReader,
    SplitRecord,
    SplitWriter,
    encode_index,
    sealed,
)
from solollm.data.shares import (
    DOCUMENT,
    Sifted,
    arranged,
    copies_of,
    digest_of,
    first_of_equals,
    sift,
)
from solollm.durable import create_file, require_space, staged_directory
from solollm.errors import ConfigError, DataError
from solollm.tokenizer import Tokenizer

MANY_PASSES = 4  # up to about that many are nearly as good as new text: arXiv:2305.16264
_BLOCK_TOKENS = 2**20
_BEGINNING_TOKENS = 200
_MOST_TOKENS = 2**60  # that an index can tell of
_NEARLY_ALL = 0.9  # of a part's tokens: where less is its own, a note says so
_SHOWN = 5  # longest documents, and examples of a cause


def mix_corpora(
    parts: Sequence[Part],
    out: Path,
    *,
    tokens: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> CorpusReport:
    """Make the corpus `out` of others with the same tokenizer, by their shares of the training
    tokens; of the validation splits it holds every document once.

    Args:
        tokens: of the training split; default: as many as the parts hold, equal documents once.
        overwrite: replace a corpus that stands at `out`; anything else there is never touched.
        progress: is told bytes of tokens while they are checked, read and written.

    Raises:
        ConfigError: a part or a setting that cannot be used, or `out` is taken.
        DataError: a part has no training documents of its own.
        IntegrityError: a part is damaged; nothing was written.
        StorageError: the disk is full or failing; an older corpus still stands.
    """
    if tokens is not None and not 1 <= tokens <= _MOST_TOKENS:
        raise ConfigError(f"tokens must be from 1 to 2^60, not {tokens:g}")
    check_folders([part.corpus for part in parts], out, overwrite=overwrite)
    inputs = open_parts(parts)
    tell = progress or (lambda _: None)
    verify_parts(inputs, tell)
    mix = _Mix(inputs, tokens, tell)
    with swept(out):
        mix.require_space(out.parent)
        with staged_directory(out) as staging:
            return mix.write(staging)


class _Mix:
    """What one mixture takes, decided when it is made, and then written."""

    def __init__(
        self, inputs: Sequence[OpenPart], tokens: int | None, tell: Callable[[Progress], None]
    ) -> None:
        self._inputs, self._tell = inputs, tell
        self._index = inputs[0].index
        self._tokenizer = corpus_tokenizer(
            min(inputs, key=lambda part: part.index.fingerprint).corpus
        )
        self._num_items = sum(part.num_documents for part in inputs)
        self._sifted: Sifted = sift(self._described())
        held = self._held_tokens()
        total = sum(held) if tokens is None else tokens
        wanted = [max(1, round(total * part.share)) for part in inputs]
        self._copies = copies_of(self._sifted.train, wanted)
        train = self._sifted.train
        taken = train["tokens"].astype(np.int64) * self._copies
        self._given = [int(taken[train["part"] == number].sum()) for number in range(len(inputs))]
        self._held = held
        self._passes = [given / tokens for given, tokens in zip(self._given, held, strict=True)]

    def require_space(self, folder: Path) -> None:
        """Raise StorageError unless the result fits there."""
        tokens = sum(self._given) + int(self._sifted.validation["tokens"].sum())
        require_space(
            folder, tokens * np.dtype(self._index.dtype).itemsize,
            fix="free some space, or ask for fewer --tokens",
        )  # fmt: skip

    def write(self, staging: Path) -> CorpusReport:
        once = np.ones(self._sifted.validation.size, np.int64)
        taken = {
            "train": (self._sifted.train, self._copies),
            "validation": (self._sifted.validation, once),
        }
        records: dict[Split, SplitRecord] = {}
        for split in SPLITS:
            documents, copies = taken[split]
            records[split] = self._write_split(
                staging, split, documents, arranged(documents, copies)
            )
        (staging / TOKENIZER_FOLDER).mkdir()
        for name, content in self._tokenizer.files().items():
            _write(staging / TOKENIZER_FOLDER / name, content)
        index = sealed(self._index.model_copy(update={"splits": records}))
        _write(staging / INDEX_NAME, encode_index(index))
        report = self._report(index)
        looked_for = frozenset.intersection(*(read_digests(part.corpus) for part in self._inputs))
        if looked_for:
            _write(staging / LOOKED_FOR_NAME, encode_digests(looked_for))
        assert report.unaccounted == 0, f"{report.unaccounted} documents left no trace"
        _write(staging / REPORT_NAME, report.model_dump_json(indent=1).encode())
        return report

    def _described(self) -> np.ndarray:
        """A table of all documents, made in one pass over the tokens."""
        found = np.empty(self._num_items, DOCUMENT)
        filled = done = 0
        total = sum(part.num_bytes for part in self._inputs)
        text_bytes = _text_bytes(self._tokenizer)
        for number, part in enumerate(self._inputs):
            for split, reader in part.readers.items():
                for block in _described_blocks(reader, text_bytes):
                    block["part"], block["is_train"] = number, split == "train"
                    found[filled : filled + block.size] = block
                    filled += block.size
                    done += int(block["tokens"].sum()) * np.dtype(self._index.dtype).itemsize
                    self._tell(Progress("reading", done, total))
        return found

    def _held_tokens(self) -> list[int]:
        """Of each part: what is there to train on."""
        train = self._sifted.train
        held = []
        for number, part in enumerate(self._inputs):
            held.append(int(train["tokens"][train["part"] == number].sum()))
            if not held[-1]:
                raise DataError(
                    f"{part.corpus} gives nothing to train on",
                    why=f"of its {part.readers['train'].record.documents:,} training documents each"
                    " is in another of the corpora too, or held out by one",
                    fix="leave it out",
                )
        return held

    def _write_split(
        self, staging: Path, split: Split, documents: np.ndarray, order: np.ndarray
    ) -> SplitRecord:
        itemsize = np.dtype(self._index.dtype).itemsize
        done = 0 if split == SPLITS[0] else sum(self._given)
        total = (sum(self._given) + int(self._sifted.validation["tokens"].sum())) * itemsize
        with SplitWriter(
            staging, split, vocab_size=self._index.vocab_size, bos_id=self._index.bos_id,
            eos_id=self._index.eos_id,
        ) as writer:  # fmt: skip
            told = 0
            for number in order:
                document = documents[number]
                writer.add(self._tokens(document, split)[1:-1], int(document["text_bytes"]))
                if writer.num_tokens - told >= _BLOCK_TOKENS:
                    told = writer.num_tokens
                    self._tell(Progress("writing", (done + told) * itemsize, total))
            self._tell(Progress("writing", (done + writer.num_tokens) * itemsize, total))
            return writer.finish()

    def _tokens(self, document: np.void, split: Split) -> np.ndarray:
        """int32, with bos and eos."""
        start = int(document["start"])
        reader = self._inputs[int(document["part"])].readers[split]
        return reader.tokens(start, start + int(document["tokens"]))

    def _beginning(self, document: np.void) -> str:
        split: Split = "train" if document["is_train"] else "validation"
        ids = self._tokens(document, split)[:_BEGINNING_TOKENS]
        return excerpt(self._tokenizer.decode(ids.tolist()))

    def _report(self, index: CorpusIndex) -> CorpusReport:
        train = self._sifted.train
        kept = np.concatenate([train[self._copies > 0], self._sifted.validation])
        distinct = kept[first_of_equals(kept) == np.arange(kept.size)]
        sizes = distinct["text_bytes"].astype(np.int64)
        longest = distinct[np.argsort(-sizes, kind="stable")[:_SHOWN]]
        return CorpusReport(
            fingerprint=index.fingerprint, items=self._num_items, kept=kept.size,
            duplicates=self._sifted.num_duplicates, dropped=self._dropped(), broken={},
            passed_over={},
            splits={
                name: SplitReport(documents=r.documents, tokens=r.tokens, text_bytes=r.text_bytes)
                for name, r in index.splits.items()
            },
            sources=tuple(
                SourceReport(source=part.name, documents=own.size, text_bytes=int(own.sum()))
                for number, part in enumerate(self._inputs)
                for own in [kept["text_bytes"][kept["part"] == number]]
            ),
            longest=tuple(
                LongDocument(
                    source=self._inputs[int(document["part"])].name,
                    text_bytes=int(document["text_bytes"]), beginning=self._beginning(document),
                )
                for document in longest
            ),
            vocab_size=index.vocab_size, tokenizer_digest=index.tokenizer_digest,
            decontaminated=_looked_for_in_all(self._inputs), parts=self._parts(),
            notes=self._notes(),
        )  # fmt: skip

    def _parts(self) -> tuple[PartReport, ...]:
        """The heaviest first."""
        part_of = self._sifted.train["part"]
        parts = [
            PartReport(
                name=part.name, fingerprint=part.index.fingerprint, weight=float(part.share),
                documents=int(self._copies[part_of == number].sum()),
                tokens=self._given[number], passes=self._passes[number],
            )
            for number, part in enumerate(self._inputs)
        ]  # fmt: skip
        return tuple(sorted(parts, key=lambda part: (-part.weight, part.fingerprint)))

    def _notes(self) -> tuple[str, ...]:
        less = [
            f"{part.name} has {held:,} tokens to train on, of {whole:,}: the rest is also in"
            " another corpus, which it counts for, or is held out by one"
            for part, held in zip(self._inputs, self._held, strict=True)
            if held < _NEARLY_ALL * (whole := part.readers["train"].record.tokens)
        ]
        return *sorted(less), *(
            f"{part.name} is passed {part.passes:.2f} times: text shown up to about {MANY_PASSES}"
            " times is nearly as good as new, more often it helps less and less (Muennighoff et al."
            " 2023, arXiv:2305.16264)"
            for part in self._parts()
            if part.passes > MANY_PASSES
        )

    def _dropped(self) -> dict[str, Cause]:
        """Training documents that are in no place of the result, by reason."""
        found = {}
        leaked = self._sifted.leaked
        if leaked.size:
            found["equal to a held-out document"] = Cause(
                count=leaked.size,
                examples=tuple(
                    Example(
                        source=self._inputs[int(document["part"])].name,
                        excerpt=self._beginning(document),
                    )
                    for document in leaked[:_SHOWN]
                ),
            )
        over = self._sifted.train["part"][self._copies == 0]
        if over.size:
            counts = np.bincount(over, minlength=len(self._inputs))
            found["beyond the share of its corpus"] = Cause(
                count=over.size,
                examples=tuple(
                    Example(source=part.name, detail=f"{count:,} documents")
                    for part, count in zip(self._inputs, counts.tolist(), strict=True)
                    if count
                ),
            )
        return found


def _looked_for_in_all(inputs: Sequence[OpenPart]) -> tuple[Decontaminated, ...]:
    """Benchmarks that the builds of all parts looked for, with what was found in them together."""
    of_parts = [
        {(found.source, found.items, found.too_short): found for found in report.decontaminated}
        for report in (read_report(part.corpus) for part in inputs)
    ]
    return tuple(
        found.model_copy(
            update={
                "found": max(of_part[key].found for of_part in of_parts),
                "texts": sum(of_part[key].texts for of_part in of_parts),
            }
        )
        for key, found in of_parts[0].items()
        if all(key in of_part for of_part in of_parts)
    )


def _text_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int64 [vocabulary]: bytes of text that each id stands for; none for special ones."""
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.int64)
    sizes[list(tokenizer.special_tokens.values())] = 0
    return sizes


def _described_blocks(reader: SplitReader, text_bytes: np.ndarray) -> Iterator[np.ndarray]:
    """Tables of a split's documents, in order, without part and split; at most a block of tokens
    or one document is read at once."""
    tokens = reader.record.tokens
    borders = np.append(reader.starts_between(0, tokens), tokens)
    first = 0
    while first < borders.size - 1:
        fits = int(np.searchsorted(borders, borders[first] + _BLOCK_TOKENS, side="right")) - 1
        last = max(first + 1, fits)
        starts = borders[first:last] - borders[first]
        ids = reader.tokens(int(borders[first]), int(borders[last])).astype("<i4", copy=False)
        block = np.empty(starts.size, DOCUMENT)
        block["start"], block["tokens"] = borders[first:last], np.diff(borders[first : last + 1])
        block["text_bytes"] = np.add.reduceat(text_bytes[ids], starts)
        content = ids.data.cast("B")
        edges = [*(4 * starts).tolist(), len(content)]
        digests = b"".join(digest_of(content[a:b]) for a, b in pairwise(edges))
        block["high"], block["low"] = np.frombuffer(digests, ">u8").reshape(-1, 2).T
        yield block
        first = last


def _write(path: Path, content: bytes) -> None:
    with create_file(path, expected_bytes=len(content)) as file:
        file.write(content)
