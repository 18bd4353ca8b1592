"""One corpus out of several, by weights: more of what there is little of, less of the rest.

Weights are shares of the training tokens. A part that is to give more than it holds gives every
document several times; one that is to give less gives those with the lowest hashes. All decisions
and the order come from hashes of the documents' tokens, so that the result depends on what the
parts hold, on the weights and on the number of tokens, and not on where the parts lie or how they
are listed.

Memory holds some 120 bytes per document, 60 per copy, and one document's tokens.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solollm.data.build import Progress
from solollm.data.canaries import CANARIES_NAME
from solollm.data.decontamination import (
    LOOKED_FOR_NAME,
    Decontaminated,
    encode_digests,
    read_digests,
)
from solollm.data.inspection import corpus_tokenizer
from solollm.data.items import excerpt
from solollm.data.placement import check_out, swept
from solollm.data.report import (
    REPORT_NAME,
    Cause,
    CorpusReport,
    LongDocument,
    MixedPart,
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
    verify_corpus,
)
from solollm.data.shares import ENTRY, count_equals, draw_copies, first_of_equals
from solollm.durable import create_file, staged_directory
from solollm.errors import ConfigError, quoted
from solollm.tokenizer import Tokenizer

MANY_PASSES = (
    4.0  # Muennighoff et al. 2023, arXiv:2305.16264: up to here nearly as good as new text
)
_LONGEST = 5


class Part(NamedTuple):
    """A built corpus and its weight; None: what it holds, in tokens."""

    corpus: Path
    weight: float | None = None


def mix_corpora(
    parts: Sequence[Part],
    out: Path,
    *,
    tokens: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> CorpusReport:
    """Build the corpus `out` from built ones.

    Args:
        parts: of one tokenizer; all with a weight or none.
        tokens: of the training split, to within a document per part; None: as many as the parts'
            hold together.
        overwrite: replace a corpus that stands at `out`; never one of the parts.

    Raises:
        ConfigError: parts that do not go together, or a setting that cannot be used.
        IntegrityError: a damaged part; every byte is compared with its index first.
        StorageError: the disk is full or failing; an older corpus still stands.
    """
    _check(parts, tokens)
    check_out(out, [str(part.corpus) for part in parts], overwrite=overwrite)
    opened = sorted((_Opened(part) for part in parts), key=lambda part: part.index.fingerprint)
    _require_one_tokenizer(opened)
    with swept(out), staged_directory(out) as staging:
        return _Mix(opened, staging, progress or (lambda _: None)).run(tokens)


class _Opened:
    """A part, proven to be whole."""

    def __init__(self, part: Part) -> None:
        self.corpus, self.weight = part.corpus, part.weight
        self.name = part.corpus.resolve().name
        self.index = verify_corpus(part.corpus)
        self.readers = {split: SplitReader(part.corpus, split) for split in SPLITS}
        self.looked_for = read_digests(part.corpus)

    def num_tokens(self) -> int:
        return sum(record.tokens for record in self.index.splits.values())


class _Mix:
    """One mix, stage by stage, inside its staging folder."""

    def __init__(
        self, parts: Sequence[_Opened], staging: Path, tell: Callable[[Progress], None]
    ) -> None:
        self._parts, self._staging, self._tell = parts, staging, tell
        self._tokenizer = corpus_tokenizer(parts[0].corpus)
        self._width = np.dtype(parts[0].index.dtype).itemsize  # bytes of a token

    def run(self, tokens: int | None) -> CorpusReport:
        documents = self._documents()
        is_first = first_of_equals(documents)
        train = documents[is_first & ~documents["validation"]]
        held_out = documents[is_first & documents["validation"]]
        wanted = self._wanted(train, tokens)
        copies = np.concatenate(
            [draw_copies(train, number, share) for number, share in enumerate(wanted)]
        )
        ordered = copies["document"][np.argsort(copies["order"], kind="stable")]
        index = self._write_index(
            {
                "train": self._write("train", train[ordered]),
                "validation": self._write("validation", held_out),
            }
        )
        shutil.copytree(self._parts[0].corpus / TOKENIZER_FOLDER, self._staging / TOKENIZER_FOLDER)
        drawn = train[np.unique(copies["document"])]
        mixed = self._mixed(train, copies["document"])
        equals = count_equals(documents, is_first)
        left_out = {
            "held out by another part": equals.held_out, "not drawn": len(train) - len(drawn),
        }  # fmt: skip
        report = CorpusReport(
            fingerprint=index.fingerprint, items=len(documents), kept=len(drawn) + len(held_out),
            duplicates=equals.equal,
            dropped={
                reason: Cause(count=count, examples=())
                for reason, count in left_out.items() if count
            },
            broken={}, passed_over={},
            splits={
                name: SplitReport(documents=r.documents, tokens=r.tokens, text_bytes=r.text_bytes)
                for name, r in index.splits.items()
            },
            sources=self._sources(np.concatenate([drawn, held_out])),
            longest=self._longest(np.concatenate([drawn, held_out])),
            vocab_size=index.vocab_size, tokenizer_digest=index.tokenizer_digest,
            decontaminated=self._decontaminated(), mixed=mixed, notes=_notes(mixed),
        )  # fmt: skip
        assert report.unaccounted == 0, f"{report.unaccounted} documents left no trace"
        digests = frozenset.intersection(*(part.looked_for for part in self._parts))
        if digests:
            self._put(LOOKED_FOR_NAME, encode_digests(digests))
        self._put(REPORT_NAME, report.model_dump_json(indent=1).encode())
        return report

    def _documents(self) -> np.ndarray:
        """Every document of every part, by its digest; held-out ones before equal others."""
        sizes = _token_bytes(self._tokenizer)
        total = sum(part.num_tokens() for part in self._parts)
        tables, done = [], 0
        splits = [(n, split) for n in range(len(self._parts)) for split in SPLITS]
        for number, split in splits:
            reader = self._parts[number].readers[split]
            found = np.empty(reader.record.documents, ENTRY)
            for document in range(len(found)):
                ids = reader.document(document)[1:-1]
                digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
                found[document] = (
                    *np.frombuffer(digest, "<u8"), number, document, ids.size + 2,
                    sizes[ids].sum(), split == "validation",
                )  # fmt: skip
                done += ids.size + 2
                self._tell(Progress("comparing", done * self._width, total * self._width))
            tables.append(found)
        documents = np.concatenate(tables)
        order = np.lexsort(
            (documents["part"], ~documents["validation"], documents["low"], documents["high"])
        )
        return documents[order]

    def _wanted(self, train: np.ndarray, tokens: int | None) -> list[float]:
        """How many tokens each part is to give."""
        held = [
            int(train["tokens"][train["part"] == number].sum(dtype=np.int64))
            for number in range(len(self._parts))
        ]
        for part, holds in zip(self._parts, held, strict=True):
            if not holds:
                raise ConfigError(
                    f"{part.name} adds nothing to train on",
                    why="each of its training documents is in another part as well, or it has none",
                    fix="leave it out",
                )
        weights = [
            holds if part.weight is None else part.weight
            for part, holds in zip(self._parts, held, strict=True)
        ]
        total = sum(held) if tokens is None else tokens
        return [total * weight / sum(weights) for weight in weights]

    def _write(self, split: Split, documents: np.ndarray) -> SplitRecord:
        index = self._parts[0].index
        with SplitWriter(
            self._staging, split, vocab_size=index.vocab_size, bos_id=index.bos_id,
            eos_id=index.eos_id,
        ) as writer:  # fmt: skip
            total = int(documents["tokens"].sum(dtype=np.int64)) * self._width
            for entry in documents:
                writer.add(self._ids(entry), int(entry["text"]))
                self._tell(Progress("writing", writer.num_tokens * self._width, total))
            return writer.finish()

    def _ids(self, entry: np.void) -> np.ndarray:
        split: Split = "validation" if entry["validation"] else "train"
        reader = self._parts[int(entry["part"])].readers[split]
        return reader.document(int(entry["number"]))[1:-1]

    def _write_index(self, records: dict[Split, SplitRecord]) -> CorpusIndex:
        first = self._parts[0].index
        index = sealed(first.model_copy(update={"splits": records}))
        self._put(INDEX_NAME, encode_index(index))
        return index

    def _put(self, name: str, content: bytes) -> None:
        with create_file(self._staging / name, expected_bytes=len(content)) as file:
            file.write(content)

    def _mixed(self, train: np.ndarray, copies: np.ndarray) -> tuple[MixedPart, ...]:
        """`copies`: the place of each in `train`."""
        total = int(train["tokens"][copies].sum(dtype=np.int64))
        found = []
        for number, part in enumerate(self._parts):
            own = train["part"] == number
            given = copies[own[copies]]
            tokens = int(train["tokens"][given].sum(dtype=np.int64))
            held = int(train["tokens"][own].sum(dtype=np.int64))
            found.append(
                MixedPart(
                    corpus=part.name, fingerprint=part.index.fingerprint, weight=part.weight,
                    documents=len(given), tokens=tokens, share=tokens / total,
                    passes=tokens / held,
                )
            )  # fmt: skip
        return tuple(found)

    def _sources(self, documents: np.ndarray) -> tuple[SourceReport, ...]:
        found = [
            SourceReport(
                source=part.name, documents=int((documents["part"] == number).sum()),
                text_bytes=int(documents["text"][documents["part"] == number].sum(dtype=np.int64)),
            )
            for number, part in enumerate(self._parts)
        ]  # fmt: skip
        return tuple(sorted(found, key=lambda entry: (-entry.text_bytes, entry.source)))

    def _longest(self, documents: np.ndarray) -> tuple[LongDocument, ...]:
        longest = documents[np.argsort(-documents["text"].astype(np.int64), kind="stable")]
        return tuple(
            LongDocument(
                source=self._parts[int(entry["part"])].name, text_bytes=int(entry["text"]),
                beginning=excerpt(self._tokenizer.decode(self._ids(entry)[:400].tolist())),
            )
            for entry in longest[:_LONGEST]
        )  # fmt: skip

    def _decontaminated(self) -> tuple[Decontaminated, ...]:
        """Of benchmarks that were looked for in every part: what was found in them together."""
        reports = [read_report(part.corpus).decontaminated for part in self._parts]
        in_all = []
        for first in reports[0]:
            same = [found for report in reports for found in report if _same(found, first)]
            if len(same) == len(reports):
                in_all.append(
                    first.model_copy(
                        update={
                            "found": max(found.found for found in same),
                            "texts": sum(found.texts for found in same),
                        }
                    )
                )
        return tuple(in_all)


def _check(parts: Sequence[Part], tokens: int | None) -> None:
    places = [part.corpus.resolve() for part in parts]
    if not parts:
        raise ConfigError("no corpora to mix", fix="name built corpora: corpora/web=0.7")
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"{place.name} is named twice", fix="give it one larger weight")
    weights = [part.weight for part in parts]
    if None in weights and any(weight is not None for weight in weights):
        raise ConfigError(
            "some corpora have a weight and others have none",
            fix="give all of them one (corpora/web=0.7), or none for what they hold",
        )
    for part in parts:
        if part.weight is not None and not 0 < part.weight < float("inf"):
            raise ConfigError(f"the weight of {part.corpus} is {part.weight:g}, not above 0")
        if (part.corpus / CANARIES_NAME).exists():
            raise ConfigError(
                f"{part.corpus} holds canaries",
                why="in a mix they would no longer be there as often as is written down",
                fix="build it without --canaries",
            )
    if tokens is not None and tokens < 1:
        raise ConfigError(f"{tokens:,} tokens are no corpus", fix="give --tokens 1e6 or more")


def _require_one_tokenizer(parts: Sequence[_Opened]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.index.tokenizer_digest != first.index.tokenizer_digest:
            raise ConfigError(
                f"{part.name} has another tokenizer than {first.name}",
                why="the same number means another text in each of them",
                fix="build one of them again with the other's:"
                f" --tokenizer {quoted(first.corpus / TOKENIZER_FOLDER)}",
            )


def _same(one: Decontaminated, other: Decontaminated) -> bool:
    return (one.source, one.items, one.too_short) == (other.source, other.items, other.too_short)


def _token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int64 [vocabulary]: bytes of text of each id."""
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.int64)


def _notes(mixed: Sequence[MixedPart]) -> tuple[str, ...]:
    return tuple(
        f"{part.corpus} is in it {part.passes:.1f} times: text that is read more than"
        f" {MANY_PASSES:.0f} times teaches little more"
        for part in mixed
        if part.passes > MANY_PASSES
    )
