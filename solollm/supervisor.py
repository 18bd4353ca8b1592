"""A training in a child process that is started again where the machine has failed under it.

A Metal fault, the system's killer for memory and a crash of the framework all look alike from
outside: the process is gone. So the trainer runs in a child, which is started again from its last
checkpoint; after a fault of memory with half the micro-batch, which leaves the global batch and the
order of the data as they are. What is the run's own affair (a setting, a damaged file, a full disk,
numbers that are not finite) is never tried again. A hang is not noticed.

The child has a process group of its own: a Ctrl-C reaches it once, through us, and so does a
Ctrl-Z. If we are killed ourselves, it goes on alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

from solollm.checkpoint import list_checkpoints
from solollm.errors import BackendError, Stopped, quoted
from solollm.host import this_host
from solollm.run_log import Row
from solollm.runs import Run
from solollm.vitals import Host

Cause = Literal["memory", "memory_pressure", "gpu", "killed"]
Memory = Mapping[str, int | bool]  # what `solollm.pretraining.resume` takes as `memory`
MAX_RESTARTS = 5  # since the last checkpoint
FIRST_PAUSE_SECONDS = 2.0  # doubled with each restart in a row
LONGEST_PAUSE_SECONDS = 120.0
_PRESSURE_PATIENCE = 60  # looks, one pause apart, at a machine that is short of memory
_ASKED = (-signal.SIGINT, -signal.SIGTERM)  # ended before it could save: still what was asked for


class Supervisor:
    """Brings the run at `run` to its end. `first` is the command that starts it, `again` gives the
    one that goes on with it; `tell` hears of every restart."""

    def __init__(
        self, run: Path, first: Sequence[str], again: Callable[[Memory], Sequence[str]], *,
        host: Host | None = None, max_restarts: int = MAX_RESTARTS,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS, tell: Callable[[Row], None] | None = None,
    ) -> None:  # fmt: skip
        self._path, self._first, self._again = run, first, again
        self._host = host or this_host()
        self._max_restarts = max_restarts
        self._first_pause = first_pause_seconds
        self._tell = tell
        self._memory: Memory = {}

    def supervise(self) -> int:
        """Start the trainer, and again as often as it helps. Gives the exit code of its last life.

        Raises:
            BackendError: it failed too often in a row, or a single row does not fit any more.
        """
        command = self._first
        with _Relay() as relay:
            failures, reached = 0, self._newest_step()
            while True:
                noted, killed = len(self._events()), self._host.oom_kills()
                code = relay.live(command)
                cause = _cause(code, self._events()[noted:], self._host.oom_kills() - killed)
                if cause is None or relay.signal_number is not None:
                    return 128 - code if code < 0 else code
                newest = self._newest_step()
                failures = failures + 1 if newest <= reached else 1
                reached = max(reached, newest)
                self._answer(cause, code, failures)
                if not self._rest(relay, cause, failures):
                    return 128 + (relay.signal_number or 0)
                command = self._again(self._memory) if self._exists() else self._first

    def _answer(self, cause: Cause, code: int, failures: int) -> None:
        """Decide what is different next time, and write it down. Raises BackendError to give up."""
        ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if failures > self._max_restarts:
            self._note("given_up", cause=cause, ending=ending, in_a_row=failures)
            raise BackendError(
                f"the trainer has failed {failures} times since its last checkpoint"
                f" ({cause.replace('_', ' ')}, {ending})",
                why="its own messages stand above, and in events.jsonl",
                fix="`solollm doctor` looks at the machine;"
                f" `solollm resume {quoted(self._path)}` goes on",
            )
        if cause in ("memory", "memory_pressure") and self._exists():
            self._memory = self._less_memory(cause, ending)
        self._note("restarted", cause=cause, ending=ending, in_a_row=failures, **self._memory)

    def _less_memory(self, cause: Cause, ending: str) -> Memory:
        run = Run.open(self._path)
        now = {**run.read_plan(), **self._memory}
        rows = int(now.get("micro_batch_size") or run.config.train.batch_size or 1)
        if rows > 1:
            return {**self._memory, "micro_batch_size": rows // 2}
        if not now.get("activation_checkpointing"):
            return {**self._memory, "activation_checkpointing": True}
        if cause == "memory_pressure":
            return self._memory  # it is others that take the memory: wait for them
        self._note("given_up", cause=cause, ending=ending)
        raise BackendError(
            "a single row with activation checkpointing is more than this machine's memory holds",
            why=f"the trainer ended for memory again ({ending})",
            fix="a shorter data.seq_len, optimizer.state_bits = 8 or a smaller model; `solollm"
            " doctor` shows what fits",
        )

    def _rest(self, relay: _Relay, cause: Cause, failures: int) -> bool:
        """Leave the machine alone for a while; False where a signal came instead."""
        pause = min(self._first_pause * 2 ** (failures - 1), LONGEST_PAUSE_SECONDS)
        looks = _PRESSURE_PATIENCE if cause == "memory_pressure" else 1
        for _ in range(looks):
            if relay.wait(pause):
                return False
            if cause == "memory_pressure" and self._host.vitals().pressure != "critical":
                break
        return True

    def _exists(self) -> bool:
        return (self._path / "run.toml").is_file()

    def _newest_step(self) -> int:
        saved = [step for step, _ in list_checkpoints(self._path / "checkpoints")]
        return max(saved, default=0)

    def _events(self) -> list[Row]:
        return list(Run.open(self._path).read_events()) if self._exists() else []

    def _note(self, kind: str, **fields: Any) -> None:
        if self._tell is not None:
            self._tell({"kind": kind, **fields})
        if self._exists():
            run = Run.open(self._path)
            with run.lock():
                run.append_event(kind, **fields)


class _Relay:
    """What ends or suspends a program at a terminal, passed on to whichever child lives. Only the
    main thread can install handlers; in any other the child is waited for and nothing is passed
    on."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._came = threading.Event()
        self._previous: dict[int, Any] = {}  # a union of signal's private types

    def __enter__(self) -> _Relay:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
                self._previous[number] = signal.signal(number, self._handle)
            self._previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def live(self, command: Sequence[str]) -> int:
        """Run a child to its end; its return code, negative for a signal."""
        self._child = subprocess.Popen(command, process_group=0)
        if self.signal_number is not None:  # it came before there was a child to pass it to
            self._child.send_signal(self.signal_number)
        try:
            return self._child.wait()
        finally:
            self._child = None

    def wait(self, seconds: float) -> bool:
        """Whether a signal came, within so long."""
        return self._came.wait(seconds)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._came.set()
        if self._child is not None:
            self._child.send_signal(number)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Stop with all that trains, as the shell says that it has; go on with it at `fg`."""
        self._signal_group(signal.SIGSTOP)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # returns once this process is continued
        signal.signal(number, self._suspend)
        self._signal_group(signal.SIGCONT)

    def _signal_group(self, number: int) -> None:
        child = self._child
        if child is not None and child.poll() is None:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.killpg(child.pid, number)


def _cause(code: int, events: Sequence[Row], oom_kills: int) -> Cause | None:
    """Why a life ended, where another one may do better; `events` are those of this life."""
    faults = [row["fault"] for row in events if row["kind"] == "fault"]
    if code > 0 and faults:
        return "memory" if faults[-1] == "memory" else "gpu"
    causes = [row.get("cause") for row in events if row["kind"] == "stopped"]
    if code == Stopped.exit_code and causes[-1:] == ["memory_pressure"]:
        return "memory_pressure"
    if code >= 0 or code in _ASKED:
        return None
    levels = [row["level"] for row in events if row["kind"] == "memory_pressure"]
    was_short = bool(levels) and levels[-1] != "normal"
    if code == -signal.SIGKILL and (oom_kills > 0 or was_short):
        return "memory"
    return "killed"
