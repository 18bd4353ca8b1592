"""The lock of a run: one writer per directory, and none to clear by hand after a crash.

The kernel holds it (`flock`) and lets go when the process ends, however it ends, so that no stale
lock exists; the file's text only tells others who holds it. Locks over a network file system are
as good as that system's `flock`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from solollm.errors import RunLocked, StorageError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_BYTES = 4096
_CLOCK_SECONDS = 2.0  # where they are derived from a clock that may be adjusted a little


class Holder(NamedTuple):
    """Who wrote the lock last: a process of one boot, told from a later one of the same number by
    its start time (`_start_time`)."""

    pid: int
    boot_id: str
    started: float

    def is_alive(self) -> bool:
        """Whether that very process runs on this machine now."""
        if self.boot_id != _boot_id():
            return False
        started = _start_time(self.pid)
        return started is not None and abs(started - self.started) < _CLOCK_SECONDS


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold the lock at `path`; it is released at the end and when the process dies.

    Raises:
        RunLocked: another process, or another thread, holds it; names the process.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"cannot open the lock {path}", why=str(error.strerror)) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(path) from None
        except OSError as error:
            why = f"this file system has no locks: {error.strerror}"
            raise StorageError(f"cannot lock {path}", why=why, fix="use a local disk") from error
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, _describe_self(), 0)
            yield
        finally:
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def read_holder(path: Path) -> Holder | None:
    """Who wrote the lock last, if the file says so."""
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_MAX_BYTES))
        return Holder(int(record["pid"]), str(record["boot_id"]), float(record["started"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _locked(path: Path) -> RunLocked:
    holder = read_holder(path)
    if holder is None:
        who, fix = "another process", f"find it with `fuser {path}`, and stop it"
    elif holder.is_alive():
        who, fix = f"process {holder.pid}", f"wait for it, or stop it with `kill {holder.pid}`"
    else:
        who = f"a child of process {holder.pid}, which has ended,"
        fix = f"stop the child; `fuser {path}` names it"
    return RunLocked(f"{path.parent} is in use", why=f"{who} is writing it", fix=fix)


def _describe_self() -> bytes:
    record = {"pid": os.getpid(), "boot_id": _boot_id(), "started": _start_time(os.getpid())}
    return json.dumps(record).encode() + b"\n"


def _start_time(pid: int) -> float | None:
    """Seconds since boot on Linux, where a time of day would move with every change of the clock;
    elsewhere since 1970. None: no such process."""
    try:
        # proc(5): the second field is a name in brackets, and may hold blanks and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        pass
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        import psutil

        return str(round(psutil.boot_time(), -1))
