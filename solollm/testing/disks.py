"""Disks that fail, die or remember: put one in `solollm.durable.DISK` and run any write.

`solollm.testing.crashes` turns what a `RecordingDisk` remembers into the states that a power cut
could leave behind.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Literal, NamedTuple

from solollm.durable import Disk

Call = Literal["open", "write", "sync", "close", "mkdir", "rename", "link", "unlink", "rmdir"]
EventKind = Literal["create", "write", "sync", "mkdir", "rename", "link", "remove", "mark"]


class CountingDisk(Disk):
    """Calls `before` ahead of every system call that changes the disk; counts them from 1. Flushes
    are counted and not made: what survives a process needs none, and tests are spared the wait."""

    def __init__(self) -> None:
        self.calls = 0

    def before(self, call: Call) -> None:
        """Override to interfere."""

    def open(self, path: Path, flags: int) -> int:
        self._count("open")
        return super().open(path, flags)

    def write(self, fd: int, data: memoryview) -> int:
        self._count("write")
        return super().write(fd, data)

    def sync(self, fd: int) -> None:
        self._count("sync")

    def close(self, fd: int) -> None:
        super().close(fd)  # a close that reports an error has closed all the same
        self._count("close")

    def mkdir(self, path: Path) -> None:
        self._count("mkdir")
        super().mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count("rename")
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._count("link")
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self._count("unlink")
        super().unlink(path)

    def rmdir(self, path: Path) -> None:
        self._count("rmdir")
        super().rmdir(path)

    def _count(self, call: Call) -> None:
        self.calls += 1
        self.before(call)


class FailingDisk(CountingDisk):
    """Fails call number `fail_at` with `code`; with `lasting` also all later ones that need room
    (deleting and renaming works on a full disk)."""

    def __init__(self, fail_at: int, code: int, *, lasting: bool = False) -> None:
        super().__init__()
        self.failures = 0
        self._fail_at = fail_at
        self._code = code
        self._lasting = lasting

    def before(self, call: Call) -> None:
        needs_room = call in ("open", "write", "sync", "mkdir")
        late = self._lasting and needs_room and self.calls > self._fail_at
        if self.calls == self._fail_at or late:
            self.failures += 1
            raise OSError(self._code, os.strerror(self._code))


class ShortDisk(CountingDisk):
    """Writes at most `max_bytes` per call, and is interrupted without effect now and then."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    def write(self, fd: int, data: memoryview) -> int:
        return super().write(fd, data[: self._max_bytes])


class DyingDisk(CountingDisk):
    """Ends the process, as kill -9 would, just before call number `die_at`."""

    def __init__(self, die_at: int) -> None:
        super().__init__()
        self._die_at = die_at

    def before(self, call: Call) -> None:
        if self.calls == self._die_at:
            os._exit(errno.EINTR)


class Event(NamedTuple):
    """Something that changed the disk, or a `mark` of the test."""

    kind: EventKind
    path: Path = Path()
    target: Path = Path()
    data: bytes = b""
    label: Hashable = None


class RecordingDisk(Disk):
    """A disk that works and writes down what it did, in order."""

    def __init__(self) -> None:
        self.log: list[Event] = []
        self._paths: dict[int, Path] = {}

    def mark(self, label: Hashable) -> None:
        """Note in the log what the test knows at this point."""
        self.log.append(Event("mark", label=label))

    def open(self, path: Path, flags: int) -> int:
        created = bool(flags & os.O_CREAT) and not path.exists()
        fd = super().open(path, flags)
        self._paths[fd] = path
        if created:
            self.log.append(Event("create", path))
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        count = super().write(fd, data)
        self.log.append(Event("write", self._paths[fd], data=bytes(data[:count])))
        return count

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.log.append(Event("sync", self._paths[fd]))

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.log.append(Event("mkdir", path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.log.append(Event("rename", source, target))

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self.log.append(Event("link", source, target))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.log.append(Event("remove", path))

    def rmdir(self, path: Path) -> None:
        super().rmdir(path)
        self.log.append(Event("remove", path))
