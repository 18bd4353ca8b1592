"""How a fault comes about in a process of the program: called there, before the program begins.

Each is a function whose last argument is the mark to leave once the fault has come, so that a proof
whose fault never came is no proof. Disks fail in `durable.DISK`, which every write goes through;
signals are real ones. What only a machine can do (pressure, heat, battery) a scripted host plays.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partialmethod
from pathlib import Path
from typing import Any, Literal

from solollm import durable
from solollm.backend import Batch, PendingMetrics, StepMetrics
from solollm.fault_proof.lives import go_sign
from solollm.testing.disks import Event, RecordingDisk
from solollm.testing.hosts import ScriptedHost
from solollm.vitals import Vitals

Call = Literal["write", "sync", "rename", "unlink"]
_HALF_SAVED_SECONDS = 5.0  # how long a save hangs where a second signal is to find it
_SHORT_PAUSE_SECONDS = 0.02


def signal_at_row(step: int, number: int, mark: Path) -> None:
    """Send this process a signal where the row of `step` is written; the next step runs then."""

    def send() -> None:
        mark.touch()
        os.kill(os.getpid(), number)

    _at_row(step, send)


def kill_between_saves(saved: Path, step: int, mark: Path) -> None:
    """SIGKILL at the row of `step`, with the save of `saved` ended and acknowledged: saves go on
    beside the steps."""

    def wait() -> None:
        while not saved.exists():
            time.sleep(_SHORT_PAUSE_SECONDS)
        time.sleep(_SHORT_PAUSE_SECONDS)

    _at_row(step - 2, wait)
    signal_at_row(step, signal.SIGKILL, mark)


def signal_again_in_the_save(step: int, number: int, mark: Path) -> None:
    """Send a signal at the row of `step`, and again in the save that it leads to."""

    def again() -> None:
        mark.touch()
        os.kill(os.getpid(), number)
        time.sleep(_HALF_SAVED_SECONDS)

    _at_row(step, lambda: os.kill(os.getpid(), number))
    durable.DISK = _StrikingDisk("write", "*/model.safetensors", again)


def hold_at_row(step: int, mark: Path) -> None:
    """Stand still where the row of `step` is written, until the parent lets it go on."""

    def hold() -> None:
        mark.touch()
        while not go_sign(mark).exists():
            time.sleep(_SHORT_PAUSE_SECONDS)

    _at_row(step, hold)


def kill_in_call(call: Call, pattern: str, mark: Path) -> None:
    """SIGKILL at the first such system call for a path like `pattern`; of a write, half is done."""

    def kill() -> None:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    durable.DISK = _StrikingDisk(call, pattern, kill)


def fail_call(call: Call, pattern: str, code: int, mark: Path) -> None:
    """Fail the first such call, of a write after half of it. With ENOSPC the disk stays full: what
    needs room fails from there on, while deleting works."""

    def fail() -> None:
        mark.touch()
        raise OSError(code, os.strerror(code))

    durable.DISK = _StrikingDisk(call, pattern, fail, stays_full=code == errno.ENOSPC)


def limit_file_size(num_bytes: int, mark: Path) -> None:
    """No file may grow beyond this: the system itself refuses to write on."""
    mark.touch()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))


def record_writes(step: int, mark: Path) -> None:
    """Leave in the mark what the disk was told, up to the acknowledged save of `step`."""
    from solollm.run_log import RunLog

    disk = durable.DISK = RecordingDisk()

    def noting(real: Callable[..., None]) -> Callable[..., None]:
        def event(self: RunLog, kind: str, **fields: Any) -> None:
            if kind == "checkpoint_saved" and fields["step"] == step and not mark.exists():
                mark.write_text(json.dumps([_plain(done) for done in disk.log]))
            real(self, kind, **fields)

        return event

    _wrap(RunLog, "event", noting)


def recorded(mark: Path) -> list[Event]:
    """What `record_writes` has left."""
    rows = json.loads(mark.read_text())
    return [
        Event(kind, Path(path), Path(target), base64.b64decode(data))
        for kind, path, target, data in rows
    ]


def break_steps(first: int, last: int, mark: Path) -> None:
    """Steps `first` to `last` give no number: loss and every gradient are NaN."""
    from solollm.data.stream import BatchStream

    def breaking(real: Callable[..., Batch]) -> Callable[..., Batch]:
        def batch(self: BatchStream, step: int) -> Batch:
            made = real(self, step)
            if not first <= step + 1 <= last:
                return made
            mark.touch()
            return replace(made, denominator=float("nan"))

        return batch

    _wrap(BatchStream, "batch", breaking)


def break_step_and_kill(bad: int, step: int, mark: Path) -> None:
    """Step `bad` is NaN, and at the row of `step` there is a SIGKILL."""
    break_steps(bad, bad, mark)
    signal_at_row(step, signal.SIGKILL, mark)


def half_apply_step(step: int, mark: Path) -> None:
    """The update of `step` is made, and then said to be half applied: what a block leaves whose
    gradient is not finite, where blocks before it are updated already (optimizer.clip = lagged).
    """
    from solollm.trainer import Trainer

    def telling(real: Callable[..., None]) -> Callable[..., None]:
        def launch(self: Any, batches: Any) -> None:
            real(self, batches)
            launched = self._launched
            if launched is not None and launched.step == step:
                mark.touch()
                self._launched = replace(launched, pending=_HalfApplied(launched.pending))

        return launch

    _wrap(Trainer, "_launch", telling)


def play_machine(looks: Sequence[Vitals], mark: Path) -> None:
    """The machine is as `looks` say, one look after the other."""
    from solollm import pretraining

    class Host(ScriptedHost):
        def vitals(self) -> Vitals:
            if self.looks + 1 >= len(looks):
                mark.touch()
            return super().vitals()

    host = Host(looks)
    _wrap(pretraining, "this_host", lambda real: lambda: host)


def hurry_restarts(mark: Path) -> None:
    """Pauses between restarts of a hundredth of their length."""
    from solollm.supervisor import FIRST_PAUSE_SECONDS, Supervisor

    mark.touch()

    def hurrying(real: Callable[..., None]) -> partialmethod[None]:
        return partialmethod(real, first_pause_seconds=FIRST_PAUSE_SECONDS / 100)

    _wrap(Supervisor, "__init__", hurrying)


def _plain(event: Event) -> list[str]:
    data = base64.b64encode(event.data).decode()
    return [event.kind, str(event.path), str(event.target), data]


class _HalfApplied(PendingMetrics):
    """A step's result, said to be applied to some blocks only."""

    def __init__(self, pending: PendingMetrics) -> None:
        self._pending = pending

    def result(self) -> StepMetrics:
        return self._pending.result()._replace(skipped=True, partial=True)


class _StrikingDisk(durable.Disk):
    """Calls `strike` once, at the first call of a kind for a path like `pattern`."""

    def __init__(
        self, call: Call, pattern: str, strike: Callable[[], None], *, stays_full: bool = False
    ) -> None:
        self._call, self._pattern, self._strike = call, pattern, strike
        self._stays_full = stays_full
        self._has_struck = False
        self._paths: dict[int, Path] = {}

    def open(self, path: Path, flags: int) -> int:
        self._refuse_where_full(needs_room=bool(flags & os.O_CREAT))
        fd = super().open(path, flags)
        self._paths[fd] = path
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        self._refuse_where_full()
        if self._is_due("write", self._paths[fd]):
            super().write(fd, data[: len(data) // 2])
            self._strike()
        return super().write(fd, data)

    def sync(self, fd: int) -> None:
        self._refuse_where_full()
        if self._is_due("sync", self._paths[fd]):
            self._strike()
        super().sync(fd)

    def mkdir(self, path: Path) -> None:
        self._refuse_where_full()
        super().mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        if self._is_due("rename", target):
            self._strike()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        if self._is_due("unlink", path):
            self._strike()
        super().unlink(path)

    def _is_due(self, call: Call, path: Path) -> bool:
        due = not self._has_struck and call == self._call and fnmatch(str(path), self._pattern)
        self._has_struck = self._has_struck or due
        return due

    def _refuse_where_full(self, *, needs_room: bool = True) -> None:
        if self._has_struck and self._stays_full and needs_room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _at_row(step: int, act: Callable[[], None]) -> None:
    """Call `act` once the row of `step` is in the log."""
    from solollm.run_log import RunLog

    def acting(real: Callable[..., None]) -> Callable[..., None]:
        def metrics(self: RunLog, row: dict[str, Any]) -> None:
            real(self, row)
            if row["step"] == step:
                act()

        return metrics

    _wrap(RunLog, "metrics", acting)


def _wrap(owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    """Put `around(what is there)` in the place of `owner.name`."""
    setattr(owner, name, around(getattr(owner, name)))
