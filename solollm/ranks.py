"""A run on several processes: rank 0 writes, the others compute with it and write nothing.

What talks between them is the backend's (`solollm.backend.Ranks`); which of them are started is the
launcher's, torchrun or mlx.launch. Here is what rank 0 does alone, what all do together, and what
is written down when one of them is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from solollm.backend import Ranks
from solollm.checkpoint import Checkpoint, latest_checkpoint, open_checkpoint, step_name
from solollm.errors import (
    IntegrityError,
    RankLost,
    RunLocked,
    SoloLLMError,
    Stopped,
    StorageError,
)
from solollm.runs import Run

_Result = TypeVar("_Result")
_PATIENCE_SECONDS = 2.0  # for the kernel to let go of the lock of a process that has just died


class Follower(Run):
    """A run as ranks other than 0 have it: they read it, and write nothing."""

    writes = False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Rank 0 holds it for all."""
        yield

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        pass

    def rewind_metrics(self, step: int) -> None:
        pass

    def append_event(self, kind: str, **fields: Any) -> None:
        pass

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        pass

    def record_lineage(self, step: int, environment: Mapping[str, Any]) -> None:
        pass


def on_first(ranks: Ranks, action: Callable[[], _Result]) -> _Result | None:
    """What `action` gives on rank 0; None on the others, which wait for it.

    Raises:
        SoloLLMError: what it raised on rank 0; on the others RankLost with the same exit code.
    """
    result, failure = None, None
    if ranks.rank == 0:
        try:
            result = action()
        except SoloLLMError as error:
            failure = error
    (code,) = ranks.largest(failure.exit_code if failure else 0)
    if failure is not None:
        raise failure
    if code:
        lost = RankLost("rank 0 could not go on; it has said why")
        lost.exit_code = int(code)
        raise lost
    return result


def latest_for_all(run: Run, ranks: Ranks) -> tuple[Checkpoint | None, list[str]]:
    """`latest_checkpoint` as rank 0 proves it; the others prove each tensor as they read it.

    Raises:
        IntegrityError: there are checkpoints, and none is intact.
    """

    def latest() -> tuple[Checkpoint | None, list[str]]:
        checkpoint, damaged = latest_checkpoint(run.checkpoints)
        if checkpoint is None and damaged:
            raise IntegrityError(
                f"no checkpoint of {run.path} is intact",
                why="; ".join(damaged),
                fix="restore one from a backup, or start a new run",
            )
        return checkpoint, damaged

    checkpoint, damaged = on_first(ranks, latest) or (None, [])
    (step,) = ranks.largest(checkpoint.step if checkpoint else -1)
    if checkpoint is None and step >= 0:
        checkpoint = open_checkpoint(run.checkpoints / step_name(int(step)), "sizes")
    return checkpoint, damaged


@contextmanager
def locked(run: Run, ranks: Ranks) -> Iterator[None]:
    """Hold the run's lock on rank 0, for all. Raises RunLocked there, RankLost elsewhere."""
    with ExitStack() as held:
        on_first(ranks, lambda: held.enter_context(run.lock()))
        yield


@contextmanager
def together(run: Run, ranks: Ranks) -> Iterator[None]:
    """Around a training: a failure is written down as an event `failed`, whichever rank is left to
    do so, and nobody leaves before all do. A launcher ends the others once one has gone, and rank 0
    may still be writing."""
    try:
        yield
    except Stopped:
        ranks.largest(0)
        raise
    except Exception as error:
        _write_down(run, ranks, error)
        raise
    ranks.largest(0)


def _write_down(run: Run, ranks: Ranks, error: Exception) -> None:
    with suppress(StorageError):  # the disk may be what has failed
        if ranks.rank == 0:
            run.append_event("failed", reason=_first_line(error))
        elif isinstance(error, RankLost):
            _write_down_for_rank_0(Run(run.path, run.config), ranks.rank, error)


def _write_down_for_rank_0(run: Run, rank: int, error: Exception) -> None:
    """Rank 0 holds the run's lock as long as it lives, and the kernel lets go when it dies: who
    gets the lock speaks for it."""
    if not Path(run.path / "run.toml").exists():  # another machine's disk
        return
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            with run.lock():
                if run.last_ending() != "failed":
                    run.append_event("failed", reason=_first_line(error), rank=rank)
                return
        except RunLocked:
            time.sleep(0.1)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
