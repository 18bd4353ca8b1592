"""The thread that writes checkpoints while training goes on; at most one save is under way.

What a checkpoint is stands in `solollm.checkpoint`; when one is due, in `solollm.trainer`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from solollm import durable
from solollm.architecture import ModelConfig
from solollm.backend import Snapshot
from solollm.checkpoint import (
    TrainerState,
    list_checkpoints,
    prune,
    save_checkpoint,
    step_name,
)
from solollm.frozen_base import TrainedAdapter
from solollm.tensorheader import spec_bytes

_HEADROOM = 1.1  # what a save itself asks for


class SavedCheckpoint(NamedTuple):
    """A finished save. `seconds` of writing, next to training; `undeleted`: older checkpoints that
    should have gone and did not, and why."""

    path: Path
    step: int
    seconds: float
    undeleted: list[str]


@dataclass(frozen=True)
class CheckpointContents:
    """What every checkpoint of a run holds besides tensors and state. `generation`: what ends an
    answer and the like, where that is more than the token ids say."""

    model: ModelConfig
    tokenizer_files: Mapping[str, bytes]
    token_ids: Mapping[str, int]
    generation: Mapping[str, Any] | None = None
    adapter: TrainedAdapter | None = None


class CheckpointWriter:
    """Saves snapshots into `folder`, then prunes it. A context manager: leaving it waits for the
    save under way, and raises its error unless another error is already on its way. `after`: the
    step that the run goes on from. What lies beyond it is damaged, and never counts as kept."""

    def __init__(
        self, folder: Path, contents: CheckpointContents, *, keep_latest: int, after: int = 0
    ) -> None:
        self._folder = folder
        self._passed_over = {step for step, _ in list_checkpoints(folder) if step > after}
        self._contents = contents
        self._keep_latest = keep_latest
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="solollm-checkpoint")
        self._under_way: Future[SavedCheckpoint] | None = None

    def require_room(self, snapshot: Snapshot) -> None:
        """Raise StorageError if the disk could not hold a checkpoint of this snapshot."""
        specs = [*snapshot.parameter_specs(), *snapshot.optimizer_specs()]
        size = sum(spec_bytes(dtype, shape) for _, dtype, shape in specs)
        durable.make_directory(self._folder)
        durable.require_space(self._folder, int(_HEADROOM * size))

    def submit(self, snapshot: Snapshot, state: TrainerState, keep: Collection[int]) -> None:
        """Start a save of `snapshot`, which is closed afterwards; then keep the latest and the
        steps in `keep`. Nothing may be under way: ask `finished(wait=True)` first."""
        assert self._under_way is None, "a save is under way"
        self._under_way = self._executor.submit(self._write, snapshot, state, frozenset(keep))

    def finished(self, *, wait: bool = False) -> SavedCheckpoint | None:
        """The save that has ended since the last call, if any. Raises what it raised:
        StorageError, or IntegrityError for a state that is not finite."""
        if self._under_way is None or not (wait or self._under_way.done()):
            return None
        future, self._under_way = self._under_way, None
        return future.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._executor.shutdown(wait=True)
        if kind is None:
            self.finished(wait=True)

    def _write(
        self, snapshot: Snapshot, state: TrainerState, keep: frozenset[int]
    ) -> SavedCheckpoint:
        started = time.monotonic()
        try:
            path = save_checkpoint(
                self._folder,
                model=self._contents.model,
                snapshot=snapshot,
                state=state,
                tokenizer_files=self._contents.tokenizer_files,
                token_ids=self._contents.token_ids,
                generation=self._contents.generation,
                adapter=self._contents.adapter,
            )
        finally:
            snapshot.close()
        self._passed_over.discard(state.step)
        undeleted = prune(
            self._folder, keep_latest=self._keep_latest, keep_steps=keep,
            passed_over=self._passed_over,
        )  # fmt: skip
        return SavedCheckpoint(path, state.step, time.monotonic() - started, undeleted)


class CheckpointAttendant(CheckpointWriter):
    """The writer's place on ranks other than 0: gives rank 0 what it writes, and writes nothing."""

    def require_room(self, snapshot: Snapshot) -> None:
        snapshot.attend()

    def submit(self, snapshot: Snapshot, state: TrainerState, keep: Collection[int]) -> None:
        snapshot.attend()
        snapshot.close()
        saved = SavedCheckpoint(self._folder / step_name(state.step), state.step, 0.0, [])
        self._under_way = Future()
        self._under_way.set_result(saved)
