"""A run on several processes: rank 0 writes, the others compute with it and write nothing.

What talks between them is the backend's (`solollm.backend.Ranks`); which of them are started is the
launcher's, torchrun or mlx.launch. Here is what rank 0 does alone, what all do together, and what
is written down when one of them is lost. What notices a loss that the framework does not:
`solollm.lifeline`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from solollm.backend import Ranks
from solollm.checkpoint import Checkpoint, latest_checkpoint, open_checkpoint, step_name
from solollm.config import MachineTable
from solollm.errors import (
    ConfigError,
    DataError,
    IntegrityError,
    PlanError,
    RankLost,
    RunLocked,
    SoloLLMError,
    Stopped,
    StorageError,
)
from solollm.lifeline import Lifeline, Patience, connect
from solollm.runs import Run

_Result = TypeVar("_Result")
_telling = threading.Lock()  # the thread that trains and the one that watches say a loss once
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


class Watched(Ranks):
    """Ranks that know of each other's end while their trainings wait for one another. Where one is
    lost and its framework does not say so, this process is ended."""

    def __init__(self, ranks: Ranks, patience: Patience) -> None:
        """Collective. Raises BackendError where the ranks do not reach each other."""
        self._ranks = ranks
        self._run: Run | None = None
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.local_world_size, self.host = ranks.local_world_size, ranks.host
        links = connect(self.rank, self.host, ranks.gather, seconds=patience.silent_seconds)
        self.lifeline = Lifeline(links, patience, note=self._note, end=self._end)

    def speak_for(self, run: Run) -> None:
        """From now on a loss is written down in this run."""
        self._run = run

    def largest(self, *values: float) -> tuple[float, ...]:
        values = self._ranks.largest(*values)
        self.lifeline.progress()
        return values

    def gather(self, text: str) -> Sequence[str]:
        return self._ranks.gather(text)

    def _note(self, error: RankLost, hangs: bool) -> None:
        if self._run is not None:
            _write_down(self._run, self, error, hangs=hangs)

    def _end(self, error: RankLost) -> None:
        # The thread that trains is inside the framework and can raise nothing any more.
        sys.stderr.write(f"rank {self.rank}: {error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)


@contextmanager
def watched(ranks: Ranks, table: MachineTable) -> Iterator[Ranks]:
    """The ranks, watching over one another where they know how to reach each other."""
    if ranks.world_size == 1 or not ranks.host:
        yield ranks
        return
    patience = Patience(table.rank_silent_seconds, table.rank_stalled_seconds)
    watching = Watched(ranks, patience)
    try:
        yield watching
    except Stopped:
        watching.lifeline.leave()
        raise
    except (ConfigError, IntegrityError, PlanError, DataError):
        watching.lifeline.refuse()
        raise
    except BaseException:
        watching.lifeline.drop()
        raise
    watching.lifeline.leave()


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
        lost = RankLost("rank 0 could not go on; it has said why", is_told=True)
        lost.exit_code = int(code)
        raise lost
    return result


def latest_for_all(run: Run, ranks: Ranks) -> tuple[Checkpoint | None, list[str]]:
    """`latest_checkpoint` as rank 0 proves it; the others prove each tensor as they read it.

    Raises:
        IntegrityError: there are checkpoints, and none is intact; or there were.
    """

    def latest() -> tuple[Checkpoint | None, list[str]]:
        checkpoint, damaged = latest_checkpoint(run.checkpoints)
        if checkpoint is None and damaged:
            raise IntegrityError(
                f"no checkpoint of {run.path} is intact",
                why="; ".join(damaged),
                fix="restore one from a backup, or start a new run",
            )
        if checkpoint is None:
            _require_unsaved(run)
        return checkpoint, damaged

    checkpoint, damaged = on_first(ranks, latest) or (None, [])
    (step,) = ranks.largest(checkpoint.step if checkpoint else -1)
    if checkpoint is None and step >= 0:
        checkpoint = open_checkpoint(run.checkpoints / step_name(int(step)), "sizes")
    return checkpoint, damaged


def _require_unsaved(run: Run) -> None:
    """Raise IntegrityError where a run has saved checkpoints before, and none is there."""
    saved = [row for row in run.read_events() if row.get("kind") == "checkpoint_saved"]
    if saved:
        raise IntegrityError(
            f"{run.checkpoints} holds no checkpoint, but the run had saved up to step"
            f" {saved[-1].get('step')}",
            why="to begin again would drop its history and, where a disk is only not mounted, go"
            " on in two places",
            fix="put the checkpoints back, or start a new run with `solollm pretrain`",
        )


@contextmanager
def locked(run: Run, ranks: Ranks) -> Iterator[None]:
    """Hold the run's lock on rank 0, for all. Raises RunLocked there, RankLost elsewhere."""
    with ExitStack() as held:
        on_first(ranks, lambda: held.enter_context(run.lock()))
        if isinstance(ranks, Watched):
            ranks.speak_for(run)
        try:
            yield
        except RankLost as error:
            if not error.is_told:
                _write_down(run, ranks, error)
            raise


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


def _write_down(run: Run, ranks: Ranks, error: Exception, *, hangs: bool = False) -> None:
    with suppress(StorageError):  # the disk may be what has failed
        if ranks.rank == 0:
            _append_failure(run, error, after=run.locked_since())
        elif isinstance(error, RankLost):
            _write_down_for_rank_0(Run(run.path, run.config), ranks.rank, error, hangs=hangs)
    if isinstance(error, RankLost):
        error.is_told = True


def _write_down_for_rank_0(run: Run, rank: int, error: RankLost, *, hangs: bool) -> None:
    """Rank 0 holds the run's lock as long as it lives, and the kernel lets go when it dies: who
    gets the lock speaks for it. One that hangs keeps it, and is spoken for all the same."""
    if not Path(run.path / "run.toml").exists():  # another machine's disk
        return
    held, deadline = True, time.monotonic() + _PATIENCE_SECONDS
    while held and time.monotonic() < deadline:
        try:
            with run.lock():
                held = False
                _append_failure(run, error, rank=rank)
        except RunLocked:
            time.sleep(0.1)
    if held and hangs:
        _append_failure(run, error, rank=rank)


def _append_failure(run: Run, error: Exception, *, after: float = 0.0, **place: int) -> None:
    """Unless the thread that trains, or the one that watches, has said it `after` then."""
    with _telling:
        if run.last_ending(after) != "failed":
            run.append_event("failed", reason=_first_line(error), **place)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
