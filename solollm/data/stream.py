"""Batches as a pure function of (corpus, seed, step): the whole cursor of a run is one integer.

A split is one long line of tokens. With T = seq_len, row w reads inputs [wT, wT + T) and labels
[wT + 1, wT + T + 1), so every token but the first is a target exactly once per epoch; a label that
is a document's first token (bos) is ignored, since nothing before it predicts it. Each epoch visits
the rows in its own order, a keyed permutation computed on the fly. Neither micro-batches, devices
nor restarts take part, and nothing of the corpus is held in memory.

    B rows of the global batch, T tokens of a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from solollm.backend import IGNORED, Batch
from solollm.data.permutation import Permutation
from solollm.data.shards import Split, SplitReader
from solollm.errors import ConfigError, DataError, IntegrityError


class StepStream(Protocol):
    """What a trainer needs of its data."""

    @property
    def fingerprint(self) -> str: ...
    def batch(self, step: int) -> Batch: ...


class EpochStream(StepStream, Protocol):
    """One split whose passes can be counted and measured."""

    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def bytes_per_target(self) -> float: ...
    def epoch(self, limit: int | None = None) -> Iterator[Batch]: ...


def open_stream(
    corpus: Path, *, split: Split = "train", seq_len: int, batch_size: int, seed: int = 0,
    mask_documents: bool = True, expected_fingerprint: str | None = None,
) -> BatchStream:  # fmt: skip
    """The batches of one split of a built corpus.

    Raises:
        ConfigError: no corpus there, or a size below its minimum.
        DataError: the split holds no document.
        IntegrityError: a damaged corpus, or not the one of `expected_fingerprint`.
    """
    reader = SplitReader(corpus, split)
    if reader.record.documents == 0:
        raise DataError(
            f"the {split} split of {corpus} is empty",
            fix="build the corpus again from more text or with another --validation-fraction",
        )
    stream = BatchStream(
        reader, split=split, seq_len=seq_len, batch_size=batch_size, seed=seed,
        mask_documents=mask_documents,
    )  # fmt: skip
    if expected_fingerprint is not None:
        require_fingerprint(stream, expected_fingerprint)
    return stream


def require_fingerprint(stream: StepStream, expected: str) -> None:
    """Refuse data that is not what a run was started on. Raises IntegrityError with both."""
    if stream.fingerprint != expected:
        raise IntegrityError(
            f"the data has fingerprint {stream.fingerprint}, the run was started on {expected}",
            why="another corpus, split, seq_len, batch_size or document masking gives other steps",
            fix="resume with the run's own corpus and settings, or start a new run",
        )


class BatchStream:
    """The batches of one split. `fingerprint` covers all that decides them but seed and step."""

    def __init__(
        self, reader: SplitReader, *, split: Split, seq_len: int, batch_size: int, seed: int,
        mask_documents: bool,
    ) -> None:  # fmt: skip
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.tokenizer_digest = reader.index.tokenizer_digest
        self._reader = reader
        self._mask_documents = mask_documents
        # Every document holds at least bos and eos, so there is at least one pair of tokens.
        self.num_rows = -(-(reader.record.tokens - 1) // seq_len)
        self._row_key = f"{reader.index.fingerprint}/{split}/{seq_len}"
        described = f"{self._row_key}/{batch_size}/{mask_documents}"
        self.fingerprint = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.batch_size)

    @property
    def num_targets(self) -> int:
        """Targets per epoch: every token but each document's first."""
        return self._reader.record.tokens - self._reader.record.documents

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the split's text."""
        return self._reader.record.text_bytes

    @property
    def bytes_per_target(self) -> float:
        """Turns nats per target into bits per byte, for part of an epoch too:
        nll / targets / ln 2 / bytes_per_target."""
        return self.num_bytes / self.num_targets

    def batch(self, step: int) -> Batch:
        """The global batch of optimizer step `step`, counted through all epochs. A row with no
        data left (end of an epoch) has only ignored labels."""
        if step < 0:
            raise ConfigError(f"there is no step {step}")
        epoch, number = divmod(step, self.steps_per_epoch)
        key = f"{self._row_key}/{self.seed}/{epoch}".encode()
        first = number * self.batch_size
        positions = np.arange(first, min(first + self.batch_size, self.num_rows))
        return self._read(Permutation(self.num_rows, key)(positions))

    def epoch(self, limit: int | None = None) -> Iterator[Batch]:
        """One pass over the split, or its first `limit` batches: the same ones at every call."""
        for step in range(self.steps_per_epoch if limit is None else limit)[: self.steps_per_epoch]:
            yield self.batch(step)

    def _read(self, rows: np.ndarray) -> Batch:
        shape = (self.batch_size, self.seq_len)
        input_ids = np.full(shape, self._reader.index.bos_id, np.int32)  # [B, T]
        labels = np.full(shape, IGNORED, np.int32)  # [B, T]
        segment_ids = np.zeros(shape, np.int32)  # [B, T]
        for place, row in enumerate(rows):
            first = int(row) * self.seq_len
            tokens = self._reader.tokens(first, first + self.seq_len + 1)  # [<= T + 1]
            count = tokens.size - 1
            input_ids[place, :count] = tokens[:-1]
            labels[place, :count] = tokens[1:]
            starts = self._reader.starts_between(first + 1, first + tokens.size) - first
            labels[place, starts - 1] = IGNORED
            begins = np.zeros(self.seq_len, np.int32)
            begins[starts[starts < count]] = 1
            begins[count:][:1] = 1  # padding is a segment of its own
            segment_ids[place] = np.cumsum(begins)
        return Batch(
            input_ids=input_ids, labels=labels,
            denominator=float((labels != IGNORED).sum()),
            segment_ids=segment_ids if self._mask_documents else None,
        )  # fmt: skip


class StagedStream:
    """One stream after another: [(0, pretraining), (900, decay)] takes steps from 900 on from the
    second, starting at its own step 0.

    Raises:
        ConfigError: stages that do not start at 0 and rise, or differ in tokenizer or shape.
    """

    def __init__(self, stages: Sequence[tuple[int, BatchStream]]) -> None:
        firsts = [first for first, _ in stages]
        if not stages or firsts[0] != 0 or any(a >= b for a, b in pairwise(firsts)):
            raise ConfigError(f"stages must start at step 0 and rise, not at {firsts}")
        self._stages = list(stages)
        kinds = {(s.tokenizer_digest, s.seq_len, s.batch_size) for _, s in stages}
        if len(kinds) > 1:
            raise ConfigError(
                "the stages' corpora do not fit together",
                why=f"tokenizer, seq_len and batch_size differ: {sorted(kinds)}",
                fix="build the second corpus with the first one's tokenizer",
            )
        described = "/".join(f"{first}:{stream.fingerprint}" for first, stream in stages)
        self.fingerprint = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def batch(self, step: int) -> Batch:
        first, stream = next(s for s in reversed(self._stages) if s[0] <= step)
        return stream.batch(step - first)


class Prefetch:
    """A stream whose next batch is made on a thread while the current step runs; a context
    manager. Asking for any other step than the next is allowed and merely not ahead of time."""

    def __init__(self, stream: StepStream) -> None:
        self.fingerprint = stream.fingerprint
        self._stream = stream
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="solollm-data")
        self._pending: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        pending, self._pending = self._pending, None
        if pending is not None and pending[0] == step:
            batch = pending[1].result()
        else:
            batch = self._stream.batch(step)
        self._pending = (step + 1, self._executor.submit(self._stream.batch, step + 1))
        return batch

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def batch_digest(batch: Batch) -> str:
    """32 hex digits over everything a session reads of a batch: equal digests, equal steps."""
    digest = hashlib.blake2b(repr(float(batch.denominator)).encode(), digest_size=16)
    for name in (
        "input_ids", "labels", "segment_ids", "token_weights", "reference_logprobs",
        "advantages", "pair_ids",
    ):  # fmt: skip
        array = getattr(batch, name)
        if array is None:
            continue
        little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}{array.dtype.name}{array.shape}".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()
