"""Pairs of answers as DPO batches: the reference's log-probabilities, and held-out margins.

The reference is the model that a run starts from. What it makes of every answer is computed once,
batch by batch, before the first step (of an adapter: with the adapter off), and kept in the run's
folder; from then on a batch is a pure function of the step, as it is of any other run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from solollm import durable
from solollm.backend import IGNORED, Batch, HostTensor, TrainSession
from solollm.config import DpoTable
from solollm.errors import IntegrityError
from solollm.finetune.packing import SampleStream
from solollm.held_out import Score
from solollm.preference import dpo, has_targets, margins
from solollm.strictfile import refused
from solollm.tensorfile import TensorFile, write_tensors

REFERENCE = "reference"  # a folder of a run's samples, with one file
_FILE = "logprobs.safetensors"


class PairStream(SampleStream):
    """`SampleStream` of pairs; the denominator counts them. A batch has no reference before
    `give_reference`. Held-out pairs are measured by `table`."""

    table: DpoTable = DpoTable()
    _reference: np.ndarray | None = None

    def give_reference(self, logprobs: np.ndarray) -> None:
        """`logprobs` float32 [N]: the reference's log p of every token of the split's samples."""
        self._reference = logprobs

    def score(self, session: TrainSession, batch: Batch) -> Score:
        """DPO's loss over the batch's pairs, and how many are preferred the right way round."""
        logprobs, counts = session.token_logprobs(batch), has_targets(batch)
        table, margin = self.table, margins(batch, logprobs)
        loss = dpo(
            batch, logprobs, beta=table.beta, label_smoothing=table.label_smoothing
        ).loss  # fmt: skip
        facts = {
            "margin": float(table.beta * margin[counts].sum()),
            "accuracy": float((margin[counts] > 0).sum()),
        }
        return Score(loss, int(counts.sum()), facts)

    def measure_reference(self, session: TrainSession, steps: int) -> np.ndarray:
        """float32 [N]: log p of every answer's tokens that the first `steps` batches hold; not a
        number elsewhere, so that nothing is trained on a reference that is not there."""
        found = np.full(len(self._samples.tokens), np.nan, np.float32)
        for step in range(min(steps, self.steps_per_epoch)):
            rows = self.rows_of(step)
            logprobs = session.token_logprobs(self._batch(rows), adapter=False)
            for place, row in enumerate(rows):
                (index,) = row
                first, last = self._samples.starts[index : index + 2]
                found[first + 1 : last] = logprobs[place, : last - first - 1]
        return found

    def _batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        batch = super()._batch(rows)
        batch = replace(batch, denominator=float(max(1, len(rows) // 2)))
        if self._reference is None:
            return batch
        reference = np.zeros(batch.labels.shape, np.float32)  # [B, T]
        for place, row in enumerate(rows):
            (index,) = row
            first, last = self._samples.starts[index : index + 2]
            reference[place, : last - first - 1] = self._reference[first + 1 : last]
        is_target = batch.labels != IGNORED
        return replace(batch, reference_logprobs=np.where(is_target, reference, np.float32(0)))


def bring_reference(
    folder: Path, streams: Sequence[PairStream], session: TrainSession, *, steps: Sequence[int],
    may_measure: bool,
) -> None:  # fmt: skip
    """Give every stream its reference: the one kept in `folder`, or, at a run's start, measured
    with the session's weights over `steps` batches of each and kept.

    Raises:
        IntegrityError: the kept one is missing where the weights have moved on, or does not fit.
    """
    path = folder / REFERENCE / _FILE
    if path.is_file():
        found = _read(path, streams)
    elif may_measure:
        found = [s.measure_reference(session, n) for s, n in zip(streams, steps, strict=True)]
        if session.rank == 0:
            _keep(path.parent, found)
    else:
        raise IntegrityError(
            f"{folder} holds no log-probabilities of the reference",
            why="they are those of the weights that this run began with, which are gone",
            fix="restore the run's folder from a backup, or start a new run",
        )
    for stream, logprobs in zip(streams, found, strict=True):
        stream.give_reference(logprobs)


def _keep(folder: Path, found: Sequence[np.ndarray]) -> None:
    tensors = {f"split_{number}": HostTensor.of(array) for number, array in enumerate(found)}
    specs = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    with durable.staged_directory(folder) as staged:
        write_tensors(staged / _FILE, specs, tensors.items())


def _read(path: Path, streams: Sequence[PairStream]) -> list[np.ndarray]:
    with TensorFile(path, follow_links=False) as file:
        found = [file.read(f"split_{number}").float32() for number in range(len(streams))]
    for stream, array in zip(streams, found, strict=True):
        if array.shape != stream.token_shape:
            raise refused(path, "shape", f"{array.shape} is not that of the samples")
    return found
