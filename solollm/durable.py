"""Every write of the product: what it acknowledges survives kill -9, a power cut and a full disk.

One protocol: write under a temporary name, flush the file, rename, flush the directory that holds
the name. A directory is staged, flushed and renamed the same way. `DISK` is the thin layer of
system calls below; tests put a failing or a recording one in its place
(`tests/solollm/test_crash_model.py` walks thousands of power cuts over it). Reading lives in
`solollm.strictfile`.

fsync(2) on macOS leaves data in the drive's cache, so F_FULLFSYNC is used there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from solollm.errors import StorageError

TEMPORARY = ".tmp-"
_ASIDE = ".old-"
_TOKEN_LENGTH = 8
_TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}.+-[0-9a-f]{{{_TOKEN_LENGTH}}}")
_ASIDE_NAME = re.compile(rf"{re.escape(_ASIDE)}[0-9a-f]{{{_TOKEN_LENGTH}}}-(.+)")
_WRITE_BYTES = 1 << 26
_COPY_BYTES = 1 << 22
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS}

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

Bytes = bytes | bytearray | memoryview


class Disk:
    """The system calls that change a disk, one method each."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free


DISK = Disk()


class DurableFile:
    """An open file that takes every byte or raises StorageError."""

    def __init__(self, path: Path, fd: int, expected_bytes: int) -> None:
        self.path = path
        self.bytes_written = 0
        self._fd = fd
        self._expected_bytes = expected_bytes

    def write(self, data: Bytes) -> None:
        """Append `data`, through short writes."""
        rest = memoryview(data).cast("B")
        needed = max(self._expected_bytes - self.bytes_written, len(rest))
        with _failures(self.path, needed):
            while len(rest):
                count = DISK.write(self._fd, rest[:_WRITE_BYTES])
                if count <= 0:
                    raise OSError(errno.EIO, "the system wrote nothing")
                rest = rest[count:]
                self.bytes_written += count

    def sync(self) -> None:
        """Flush the data to the medium."""
        with _failures(self.path):
            DISK.sync(self._fd)


@contextlib.contextmanager
def create_file(path: Path, *, expected_bytes: int = 0) -> Iterator[DurableFile]:
    """A new file to stream into; flushed only by `sync()` or by its `staged_directory`."""
    with _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        yield DurableFile(path, fd, expected_bytes)


def replace_file(path: Path, chunks: Bytes | Iterable[Bytes]) -> None:
    """Give `path` this content: after a crash it holds the old bytes or the new, never a mix.

    Raises:
        StorageError: the disk is full or failing; the old content is still there.
    """
    temporary = path.parent / f"{TEMPORARY}{path.name}-{secrets.token_hex(_TOKEN_LENGTH // 2)}"
    pieces = (chunks,) if isinstance(chunks, Bytes) else chunks
    try:
        with create_file(temporary) as file:
            for piece in pieces:
                file.write(piece)
            file.sync()
        with _failures(path):
            DISK.rename(temporary, path)
            _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            DISK.unlink(temporary)
        raise


def share_file(source: Path, target: Path) -> None:
    """A new name `target` for the finished file `source`, which nobody writes to any more; where
    the file system knows no second names, a copy. Flushed by `target`'s `staged_directory`."""
    try:
        DISK.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            with _failures(target):
                raise
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """A new file with the bytes of `source`, streamed; flushed as `create_file` says."""
    with (
        source.open("rb") as reading,
        create_file(target, expected_bytes=os.fstat(reading.fileno()).st_size) as writing,
    ):
        while piece := reading.read(_COPY_BYTES):
            writing.write(piece)


def append_line(path: Path, line: bytes) -> None:
    """Add one line to a log, in one write and without a flush: a crash may cost the last lines.

    A piece of a line left by a crash is closed first, so that it damages no other line.
    """
    with _open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as fd:
        with _failures(path):
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        DurableFile(path, fd, 0).write((b"\n" if torn else b"") + line + b"\n")


def make_directory(path: Path) -> None:
    """Create `path` and its parents so that they survive a crash; existing ones are left alone."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with _failures(path):
        try:
            DISK.mkdir(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        _sync(path.parent)


@contextlib.contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `final` whole or not at all.

    On success every file in it is flushed, it is renamed, and the parent is flushed. A directory
    that stands at `final` is moved aside first and removed last; `clean_stale` puts it back after
    a crash in between. On an exception nothing is left and an older `final` still stands.
    """
    make_directory(final.parent)
    token = secrets.token_hex(_TOKEN_LENGTH // 2)
    staging = final.parent / f"{TEMPORARY}{final.name}-{token}"
    with _failures(staging):
        DISK.mkdir(staging)
    try:
        yield staging
        with _failures(final):
            _sync_tree(staging)
            _commit(staging, final)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(staging)
        raise


def remove_tree(path: Path, first: Iterable[str] = ("manifest.json",)) -> None:
    """Delete a directory. The files of `first` go before all others and for good, so that what a
    crash leaves is never mistaken for a whole one.

    Raises:
        StorageError: something in it could not be deleted.
    """
    with _failures(path):
        marks = [path / name for name in first if (path / name).exists()]
        for mark in marks:
            DISK.unlink(mark)
        if marks:
            _sync(path)
        _remove(path)


def clean_stale(folder: Path) -> list[str]:
    """Tidy what a crash left in `folder`; returns what was done. Only for the folder's one writer.

    A directory that was moved aside for a successor that never arrived gets its name back; every
    other temporary is deleted. What cannot be deleted is named and left, and so is whatever has
    not exactly such a name: it may be the user's.
    """
    report: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        aside = _ASIDE_NAME.fullmatch(path.name)
        try:
            if aside and not (folder / aside[1]).exists():
                DISK.rename(path, folder / aside[1])
                report.append(f"restored {aside[1]}")
            elif aside or _TEMPORARY_NAME.fullmatch(path.name):
                _remove(path)
                report.append(f"removed {path.name}")
        except OSError as error:
            report.append(f"could not tidy {path.name}: {error.strerror or error}")
    return report


def require_space(
    folder: Path, needed_bytes: int, *, fix: str = "free some space, or keep fewer checkpoints"
) -> None:
    """Raise StorageError unless `folder`'s file system has `needed_bytes` free."""
    with _failures(folder):
        free = DISK.free_bytes(folder)
    if free < needed_bytes:
        raise StorageError(
            f"not enough disk space under {folder}",
            why=f"{needed_bytes:,} bytes are needed and {free:,} are free",
            fix=fix,
        )


@contextlib.contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    with _failures(path):
        fd = DISK.open(path, flags)
    try:
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            DISK.close(fd)
        raise
    with _failures(path):
        DISK.close(fd)


def _sync(path: Path) -> None:
    """Flush a file's data or a directory's names. Some file systems (shared folders of virtual
    machines, FUSE) cannot flush a directory and say so: nothing more can be asked of them."""
    fd = DISK.open(path, os.O_RDONLY)
    try:
        DISK.sync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC or not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise
    finally:
        DISK.close(fd)


def _sync_tree(folder: Path) -> None:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            _sync_tree(entry)
        else:
            _sync(entry)
    _sync(folder)


def _commit(staging: Path, final: Path) -> None:
    token = secrets.token_hex(_TOKEN_LENGTH // 2)
    aside = final.parent / f"{_ASIDE}{token}-{final.name}"
    replaces = final.exists()
    if replaces:
        DISK.rename(final, aside)
    try:
        DISK.rename(staging, final)
    except BaseException:
        if replaces:
            with contextlib.suppress(OSError):
                DISK.rename(aside, final)
        raise
    _sync(final.parent)
    if replaces:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        DISK.unlink(path)
        return
    for entry in sorted(path.iterdir()):
        _remove(entry)
    DISK.rmdir(path)


@contextlib.contextmanager
def _failures(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _storage_error(error, path, needed_bytes) from error


def _storage_error(error: OSError, path: Path, needed_bytes: int) -> StorageError:
    folder = path if path.is_dir() else path.parent
    try:
        room = f"{DISK.free_bytes(folder):,} are free"
    except OSError:
        room = "the free space is unknown"
    advice = {
        errno.ENOSPC: "free some space and run again",
        errno.EDQUOT: "your disk quota is used up: free some space and run again",
        errno.EFBIG: "a file-size limit is set (`ulimit -f`): raise it and run again",
        errno.EIO: "the disk reports a fault: check it, and copy your runs to another one",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EMFILE: "too many files are open (`ulimit -n`): raise the limit",
    }
    about_the_place = {  # no room would help
        errno.EEXIST: "a file stands where a folder is needed: choose another name",
        errno.ENOTDIR: "a file stands where a folder is needed: choose another name",
        errno.EACCES: "you may not write there: choose another folder",
        errno.EPERM: "you may not write there: choose another folder",
    }
    if error.errno in about_the_place:
        return StorageError(
            f"cannot write {path}: {error.strerror}", fix=about_the_place[error.errno]
        )
    return StorageError(
        f"cannot write {path}: {error.strerror or error}",
        why=f"{needed_bytes:,} more bytes were needed and {room}",
        fix=advice.get(error.errno or 0, "what existed before is still there"),
    )
