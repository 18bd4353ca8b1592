"""From sources to a corpus: read, screen, spool, drop duplicates, tokenise, write shards.

Equal texts give an equal corpus, fingerprint and all, however the sources were listed or where
they lay. Documents stream through; what is held at once is one bounded text, one batch for the
tokenizer, and the index of one bucket of the spool. A corpus appears whole or not at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from solollm.data.canaries import CANARIES_NAME, Canaries
from solollm.data.dedup import Spool, Spooled, Survey
from solollm.data.intake import Intake, Screening
from solollm.data.items import Limits
from solollm.data.likeness import Like
from solollm.data.placement import check_out, swept
from solollm.data.report import (
    REPORT_NAME,
    CorpusReport,
    SplitReport,
    Tally,
)
from solollm.data.selection import Selection
from solollm.data.shards import (
    INDEX_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    CorpusIndex,
    Split,
    SplitRecord,
    SplitWriter,
    encode_index,
    sealed,
    token_dtype,
)
from solollm.data.sources import check_sources
from solollm.data.splits import HeldOut, SplitRule, tail_start
from solollm.durable import create_file, remove_tree, staged_directory
from solollm.errors import ConfigError, DataError
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import train_tokenizer

__all__ = ["CorpusReport", "Progress", "build_corpus", "default_vocab_size"]

_TOKENIZE_BYTES = 2**20
_SAMPLE_BYTES = 2**28  # text that a tokenizer is trained on: the first documents by digest
_MAX_EXCESS = 3.0  # of the share asked for


class Progress(NamedTuple):
    """How far a stage (reading, comparing, tokenizer, encoding) is, in bytes of text, of `total` if
    that is known."""

    stage: str
    done: int
    total: int | None


def build_corpus(
    sources: Sequence[str | Path],
    out: Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    validation_fraction: float = 0.02,
    split_rule: SplitRule = "hash",
    near_duplicates: float | None = None,
    like: Like | None = None,
    screening: Screening | None = None,
    canaries: Canaries | None = None,
    limits: Limits | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> CorpusReport:
    """Build the corpus `out` from `sources` (see `solollm.data.sources`).

    Args:
        tokenizer: none: one is trained on the training split and kept in `out/tokenizer`.
        vocab_size: of the tokenizer to train; default: `default_vocab_size` of the text.
        validation_fraction: share of documents held out by the hash of their text, so that
            adding documents moves none. Where that misses the share by far, as with a handful of
            documents, the end of the longest one is held out instead.
        split_rule: "sha1-mod20" holds out texts whose SHA-1 is 0 modulo 20, whatever the fraction.
        near_duplicates: also leave out texts of which a kept one shares this much (0.5 to 1; see
            `solollm.data.near_duplicates`); None: equal texts alone.
        like: keep the texts that are most like given ones (`solollm.data.likeness`).
        screening: benchmark items, personal data and poor text that is looked for and left out.
        canaries: planted among the training documents, to measure later what a model memorised.
        overwrite: replace a corpus that stands at `out`; anything else there is never touched.

    Raises:
        ConfigError: a source or a setting that cannot be used, or `out` is taken.
        DataError: nothing usable is left.
        StorageError: the disk is full or failing; an older corpus still stands.
    """
    names = [str(source) for source in sources]
    check_sources(names)
    held_out = HeldOut(split_rule, validation_fraction)
    if tokenizer is not None and vocab_size is not None:
        raise ConfigError(
            "both a tokenizer and a vocab_size are given",
            why="a ready tokenizer has its own vocabulary",
            fix="leave one of them out",
        )
    if near_duplicates is not None and not 0.5 <= near_duplicates <= 1:
        raise ConfigError(
            f"near_duplicates is {near_duplicates:g}, not a share from 0.5 to 1",
            why="texts that share less than half of their runs of words are different texts",
            fix="0.8 leaves out what is nearly the same",
        )
    check_out(out, names, overwrite=overwrite)
    with swept(out), staged_directory(out) as staging:
        build = _Build(
            names, staging, held_out=held_out, limits=limits or Limits(), canaries=canaries,
            screening=screening or Screening(), progress=progress,
        )  # fmt: skip
        return build.run(tokenizer, vocab_size, near_duplicates, like)


def default_vocab_size(text_bytes: int) -> int:
    """A vocabulary that the text can fill: 2,048 up to 20 MB, 8,192 up to 500 MB, else 32,768."""
    if text_bytes <= 20e6:
        return 2048
    return 8192 if text_bytes <= 500e6 else 32_768


class _Build:
    """One build, stage by stage, inside its staging folder."""

    def __init__(
        self, sources: list[str], staging: Path, *, held_out: HeldOut, limits: Limits,
        canaries: Canaries | None, screening: Screening,
        progress: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        self._sources, self._staging = sources, staging
        self._held_out, self._canaries = held_out, canaries
        self._intake = Intake(
            staging, screening, limits=limits, held_out=held_out, canaries=canaries
        )
        self._tail_of: bytes | None = None  # the document whose end is held out, instead
        self._tail_chars = 0
        self._tell = progress or (lambda _: None)
        self._tally = Tally([_source_name(source) for source in sources])
        self._notes: list[str] = []
        (staging / "spool").mkdir()
        self._spool = Spool(staging / "spool")

    def run(
        self, tokenizer: Tokenizer | None, vocab_size: int | None, near: float | None,
        like: Like | None,
    ) -> CorpusReport:  # fmt: skip
        self._intake.read(
            self._sources, self._spool, self._tally,
            lambda done: self._tell(Progress("reading", done, None)),
        )  # fmt: skip
        selection = Selection(
            self._spool, self._tally, self._staging,
            lambda done, total: self._tell(Progress("comparing", done, total)),
        )  # fmt: skip
        if near is not None:
            selection.leave_out_near(near)
        if like is not None and self._spool.survey().documents:
            self._notes.append(selection.leave_out_unlike(like))
        survey = self._spool.survey()
        if not survey.documents:
            raise self._nothing_left()
        self._settle_split(survey)
        if tokenizer is None:
            vocab_size = vocab_size or default_vocab_size(survey.train_bytes)
            tokenizer = train_tokenizer(self._sample(survey), vocab_size)
        records = self._encode(tokenizer, survey)
        remove_tree(self._staging / "spool")
        index = self._write_index(tokenizer, records)
        report = self._tally.finish(
            fingerprint=index.fingerprint, duplicates=survey.duplicates,
            splits={
                name: SplitReport(
                    documents=r.documents, tokens=r.tokens, text_bytes=r.text_bytes
                )
                for name, r in records.items()
            },
            vocab_size=tokenizer.vocab_size, tokenizer_digest=tokenizer.digest,
            planted=self._canaries.num_documents if self._canaries else 0,
            notes=tuple(self._notes), **self._intake.finish(),
        )  # fmt: skip
        assert report.unaccounted == 0, f"{report.unaccounted} items left no trace"
        if self._canaries is not None:
            _write(self._staging / CANARIES_NAME, self._canaries.encoded())
        _write(self._staging / REPORT_NAME, report.model_dump_json(indent=1).encode())
        return report

    def _nothing_left(self) -> DataError:
        lost = {
            reason: cause
            for kind in ("broken", "dropped", "passed_over")
            for reason, cause in self._tally.causes(kind).items()
        }
        told = [
            f"{cause.count} {reason} (such as {cause.examples[0].source})"
            for reason, cause in lost.items()
        ]
        fix = "give text files, JSON lines with a `text` field, or Parquet with a text column"
        if told and not self._tally.causes("broken") | self._tally.causes("passed_over"):
            fix = "look at what was left out, and choose other rules, or other sources"
        if told and not self._tally.items:
            fix = "name the files one by one (FOLDER/*): then they are read, whatever their suffix"
        return DataError(
            f"nothing usable is left of {self._tally.items:,} item{'s'[: self._tally.items != 1]}",
            why=", ".join(told) or "the sources hold no files",
            fix=fix,
        )

    def _settle_split(self, survey: Survey) -> None:
        """With few documents a hash may hold out none, all, or far more text than was asked for."""
        share = self._held_out.share
        found = (survey.text_bytes - survey.train_bytes) / survey.text_bytes
        most = 1.0 if self._held_out.rule == "sha1-mod20" else min(1.0, _MAX_EXCESS * share)
        if share == 0 or 0 < found < most:
            return
        self._tail_of, self._tail_chars = survey.longest, max(1, int(survey.text_bytes * share))
        self._notes.append(
            f"a split of {survey.documents} documents by hash would hold out {found:.0%} of the"
            " text: the end of the longest document is held out instead"
        )

    def _texts(self) -> Iterator[tuple[Split, str, Spooled | None]]:
        """(split, text, the document that it begins) in the final order."""
        for document in self._spool.documents():
            text = document.text.decode()
            if self._tail_of is None:
                yield ("validation" if document.is_validation else "train"), text, document
                continue
            at = len(text)
            if document.digest == self._tail_of:
                at = tail_start(text, self._tail_chars)
            yield "train", text[:at], document
            if at < len(text):
                yield "validation", text[at:], None

    def _sample(self, survey: Survey) -> Iterator[str]:
        total, done = min(survey.text_bytes, _SAMPLE_BYTES), 0
        for split, text, _ in self._texts():
            if split == "train":
                yield text
                done += len(text)
                self._tell(Progress("tokenizer", min(done, total), total))
            if done >= _SAMPLE_BYTES:
                break

    def _encode(self, tokenizer: Tokenizer, survey: Survey) -> dict[Split, SplitRecord]:
        ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(
                    SplitWriter(self._staging, split, vocab_size=tokenizer.vocab_size, **ids)
                )
                for split in SPLITS
            }
            pending: list[tuple[Split, str]] = []
            size = 0
            texts = self._texts()
            for split, text, document in self._canaries.among(texts) if self._canaries else texts:
                if document is not None:
                    self._tally.kept(document.text, document.source)
                pending.append((split, text))
                size += len(text)
                if size >= _TOKENIZE_BYTES:
                    _encode_batch(tokenizer, pending, writers)
                    pending, size = [], 0
                    self._tell(Progress("encoding", self._tally.text_bytes, survey.text_bytes))
            _encode_batch(tokenizer, pending, writers)
            self._tell(Progress("encoding", survey.text_bytes, survey.text_bytes))
            return {split: writer.finish() for split, writer in writers.items()}

    def _write_index(self, tokenizer: Tokenizer, records: dict[Split, SplitRecord]) -> CorpusIndex:
        (self._staging / TOKENIZER_FOLDER).mkdir()
        for name, content in tokenizer.files().items():
            _write(self._staging / TOKENIZER_FOLDER / name, content)
        index = sealed(
            CorpusIndex(
                dtype=token_dtype(tokenizer.vocab_size), vocab_size=tokenizer.vocab_size,
                bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
                tokenizer_digest=tokenizer.digest, splits=records,
            )
        )  # fmt: skip
        _write(self._staging / INDEX_NAME, encode_index(index))
        return index


def _encode_batch(
    tokenizer: Tokenizer, pending: list[tuple[Split, str]], writers: dict[Split, SplitWriter]
) -> None:
    if not pending:
        return
    for (split, text), ids in zip(
        pending, tokenizer.encode_batch([text for _, text in pending]), strict=True
    ):
        writers[split].add(ids, len(text.encode()))


def _write(path: Path, content: bytes) -> None:
    with create_file(path, expected_bytes=len(content)) as file:
        file.write(content)


def _source_name(source: str) -> str:
    """How a report names a source: without the path that leads to it."""
    return source if "://" in source else Path(source).resolve().name
