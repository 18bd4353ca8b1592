"""Batches of samples, as a pure function of (samples, seed, step).

With packing a row holds several samples, each its own segment: attention and labels stay apart, so
that a sample is learnt as if it stood alone. Which samples share a row is decided once, from their
lengths; each epoch visits the rows in its own order. Samples of a group lie in neighbouring rows.

    B rows of the global batch, T positions of a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from solollm.backend import IGNORED, Batch
from solollm.data.permutation import Permutation
from solollm.errors import ConfigError, DataError
from solollm.finetune.samples import SampleSet, SampleSplit

_WIDTH_STEP = 64  # rows that are not packed are as long as their longest sample, in steps of this


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which samples share a row: best fit, the longest first. Every length fits.

    The rows with room for exactly n positions are listed by n, and a big integer says which lists
    are not empty, so that finding the tightest one is a shift.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    filled = 0  # bit n: some row has room for n
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = filled >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                filled &= ~(1 << room)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        left = room - length
        by_room.setdefault(left, []).append(row)
        filled |= 1 << left
    return rows


class SampleStream:
    """The batches of one split; the same questions are answered as by `data.stream.BatchStream`."""

    def __init__(
        self, samples: SampleSet, split: SampleSplit, *, seq_len: int, batch_size: int, seed: int,
        packing: bool,
    ) -> None:  # fmt: skip
        """Raises DataError for an empty split, ConfigError for a sample that fits no row."""
        self._samples = samples.split(split)
        self._record = samples.index.splits[split]
        lengths = self._samples.num_positions
        if not len(lengths):
            raise DataError(f"there are no {split.replace('_', '-')} samples")
        if lengths.max() > seq_len:
            raise ConfigError(
                f"a sample has {lengths.max()} positions, a row {seq_len}",
                fix=f"--set data.seq_len={lengths.max()}, or start the run anew",
            )
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.tokenizer_digest = samples.index.tokenizer_digest
        self._packing = packing and self._samples.group == 1
        self._pad_id = samples.tokenizer.pad_id
        group = self._samples.group
        if batch_size % group:
            raise ConfigError(f"train.batch_size {batch_size} splits pairs", fix="make it even")
        if self._packing:
            self._rows = pack(lengths.tolist(), seq_len)
        else:
            self._rows = [[index] for index in range(len(lengths))]
        self._num_units = len(self._rows) // group  # a unit: a row, or the rows of one group
        self._key = f"{samples.index.fingerprint}/{split}/{seq_len}/{self._packing}"
        described = f"{self._key}/{batch_size}"
        self.fingerprint = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Of an array with a value for every token of the split."""
        return self._samples.tokens.shape

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.batch_size)

    @property
    def num_targets(self) -> int:
        """Targets per epoch."""
        return self._samples.num_targets

    @property
    def bytes_per_target(self) -> float:
        """UTF-8 bytes of what is learnt, per target; an end of turn is a target without bytes."""
        return max(1, self._record.text_bytes) / max(1, self.num_targets)

    @property
    def fill(self) -> float:
        """The share of an epoch's positions that hold a token."""
        return float(self._samples.num_positions.sum()) / (self.num_rows * self.seq_len)

    def batch(self, step: int) -> Batch:
        """The global batch of optimizer step `step`, counted through all epochs. A row with no
        sample left (end of an epoch) has only ignored labels."""
        return self._batch(self.rows_of(step))

    def rows_of(self, step: int) -> list[list[int]]:
        """Which samples stand in the rows of a step's batch."""
        if step < 0:
            raise ConfigError(f"there is no step {step}")
        epoch, number = divmod(step, self.steps_per_epoch)
        key = f"{self._key}/{self.seed}/{epoch}".encode()
        group = self._samples.group
        units = self.batch_size // group
        positions = np.arange(number * units, min((number + 1) * units, self._num_units))
        chosen = Permutation(self._num_units, key)(positions)
        return [self._rows[int(u) * group + k] for u in chosen for k in range(group)]

    def epoch(self, limit: int | None = None) -> Iterator[Batch]:
        """One pass over the split, or its first `limit` batches: the same ones at every call."""
        for step in range(self.steps_per_epoch if limit is None else limit)[: self.steps_per_epoch]:
            yield self.batch(step)

    def _batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        width = self.seq_len if self._packing else self._width(rows)
        shape = (self.batch_size, width)
        input_ids = np.full(shape, self._pad_id, np.int32)  # [B, T]
        labels = np.full(shape, IGNORED, np.int32)  # [B, T]
        segment_ids = np.zeros(shape, np.int32)  # [B, T]
        for place, row in enumerate(rows):
            start = 0
            for number, index in enumerate(row):
                ids, produced = self._samples.sample(index)
                stop = start + len(ids) - 1
                input_ids[place, start:stop] = ids[:-1]
                labels[place, start:stop] = np.where(produced[1:], ids[1:], IGNORED)
                segment_ids[place, start:stop] = number
                start = stop
            segment_ids[place, start:] = len(row)  # padding is a segment of its own
        pair_ids = None
        if self._samples.group == 2:
            pair_ids = (np.arange(self.batch_size) // 2).astype(np.int32)
        return Batch(
            input_ids=input_ids, labels=labels, denominator=float((labels != IGNORED).sum()),
            segment_ids=segment_ids, pair_ids=pair_ids,
        )  # fmt: skip

    def _width(self, rows: Sequence[Sequence[int]]) -> int:
        lengths = self._samples.num_positions
        longest = max(int(lengths[index]) for row in rows for index in row)
        return min(self.seq_len, -(-longest // _WIDTH_STEP) * _WIDTH_STEP)
