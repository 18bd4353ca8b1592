"""Durable writes under failing disks: an error with path and bytes, and nothing lost."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from solollm import durable
from solollm.errors import StorageError
from solollm.testing.disks import FailingDisk, RecordingDisk, ShortDisk

CODES = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.EFBIG]


def replace(folder: Path) -> None:
    durable.replace_file(folder / "plan.json", (b"new ", b"content"))


def stage(folder: Path) -> None:
    with durable.staged_directory(folder / "step") as staging:
        durable.make_directory(staging / "inner")
        for name in ("a", "inner/b"):
            with durable.create_file(staging / name, expected_bytes=3) as file:
                file.write(b"new")


def remove(folder: Path) -> None:
    durable.remove_tree(folder / "step")


def append(folder: Path) -> None:
    durable.append_line(folder / "log", b"{}")


def make(folder: Path) -> None:
    durable.make_directory(folder / "x" / "y")


def prepare(folder: Path) -> Path:
    """What exists before: a file, a directory with a manifest, a log."""
    folder.mkdir()
    (folder / "plan.json").write_bytes(b"old")
    (folder / "step").mkdir()
    (folder / "step" / "manifest.json").write_bytes(b"old")
    (folder / "step" / "a").write_bytes(b"old")
    (folder / "log").write_bytes(b"[]\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is visible under its own name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("code", CODES, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("action", [replace, stage, append, make, remove])
def test_any_failing_call_is_reported_and_costs_nothing(
    action: Callable[[Path], None], code: int, lasting: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Guards: a call whose failure is ignored, leaves half a file under a final name, or is told
    without path. Every call of every action fails once, for every code."""
    old = contents(prepare(tmp_path / "old"))
    action(tmp_path / "old")
    new = contents(tmp_path / "old")
    for number in range(1, 1000):
        folder = prepare(tmp_path / str(number))
        disk = FailingDisk(number, code, lasting=lasting)
        monkeypatch.setattr(durable, "DISK", disk)
        error = error_of(action, folder)
        monkeypatch.undo()
        if not disk.failures:
            break
        assert error is not None, f"call {number} failed unheard"
        assert error.exit_code == 74
        for part in (str(folder), os.strerror(code), "bytes were needed and"):
            assert part in str(error)
        if not lasting and action is not remove:
            assert not any(durable.TEMPORARY in name for name in contents(folder))
        durable.clean_stale(folder)
        tidied = contents(folder)
        gone = action is remove and "step/manifest.json" not in tidied
        assert gone or tidied in (old, new), f"call {number}"
    assert error is None
    assert number > 2


class NoFolderSync(durable.Disk):
    """A shared folder of a virtual machine: files are flushed, folders cannot be."""

    def sync(self, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) or self.is_broken:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().sync(fd)

    is_broken = False


@pytest.mark.parametrize("action", [replace, stage, append, make, remove])
def test_a_file_system_that_flushes_no_folder_is_written_to(
    action: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: no training at all on such a folder; or a file that is not flushed, and nobody
    says so."""
    expected = prepare(tmp_path / "expected")
    action(expected)
    folder, disk = prepare(tmp_path / "here"), NoFolderSync()
    monkeypatch.setattr(durable, "DISK", disk)
    action(folder)
    assert contents(folder) == contents(expected)
    disk.is_broken = True
    if action in (replace, stage):
        assert error_of(action, folder) is not None


def error_of(action: Callable[[Path], None], folder: Path) -> StorageError | None:
    try:
        action(folder)
    except StorageError as error:
        return error
    return None


def test_failed_write_leaves_no_descriptor_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a full disk that, met again and again, ends as `too many open files`."""
    before = len(list(Path("/dev/fd").iterdir()))
    for number in range(1, 40):
        monkeypatch.setattr(durable, "DISK", FailingDisk(number, errno.ENOSPC))
        for action in (replace, stage):
            error_of(action, tmp_path)
    assert len(list(Path("/dev/fd").iterdir())) == before


@pytest.mark.parametrize("max_bytes", [1, 3, 1000])
def test_short_writes_are_completed(
    max_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: write(2) that takes less than it was given, as it does near a full disk."""
    monkeypatch.setattr(durable, "DISK", ShortDisk(max_bytes))
    content = bytes(range(256)) * 5
    durable.replace_file(tmp_path / "a", (content, memoryview(content), bytearray(content)))
    assert (tmp_path / "a").read_bytes() == content * 3


def test_write_that_takes_nothing_is_an_error_not_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an endless loop on a device that accepts no byte."""
    monkeypatch.setattr(durable, "DISK", ShortDisk(0))
    with pytest.raises(StorageError, match="wrote nothing"):
        durable.replace_file(tmp_path / "a", b"content")
    assert list(tmp_path.iterdir()) == []


def test_error_says_how_much_was_needed_and_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: `No space left on device` and nothing else."""
    disk = FailingDisk(3, errno.ENOSPC)
    monkeypatch.setattr(durable, "DISK", disk)
    monkeypatch.setattr(FailingDisk, "free_bytes", lambda self, path: 4096)
    with durable.create_file(tmp_path / "a", expected_bytes=10_000) as file:
        file.write(bytes(1000))
        with pytest.raises(StorageError, match=r"9,000 more bytes were needed and 4,096 are free"):
            file.write(bytes(1000))


def test_a_file_where_a_folder_is_needed_is_not_a_full_disk(tmp_path: Path) -> None:
    """Guards: `File exists; 0 more bytes were needed and 81,708,625,920 are free`."""
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(StorageError, match="a file stands where a folder is needed") as caught:
        durable.make_directory(tmp_path / "taken" / "run")
    assert "bytes" not in str(caught.value)
    assert (tmp_path / "taken").read_text() == "mine"


def test_room_is_checked_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an hour of writing that ends at a full disk."""
    monkeypatch.setattr(durable.Disk, "free_bytes", lambda self, path: 999)
    durable.require_space(tmp_path, 999)
    with pytest.raises(StorageError, match=r"1,000 bytes are needed and 999 are free"):
        durable.require_space(tmp_path, 1000)


def test_iterable_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    """Guards: a bug or Ctrl-C in the producer that costs the old content or leaves a temporary."""

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        durable.replace_file(tmp_path / "a", broken())
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "d")
    assert contents(tmp_path) == {"a": b"old"}
    assert not list(tmp_path.glob(".*"))


def interrupted(final: Path) -> None:
    with durable.staged_directory(final) as folder:
        (folder / "x").write_bytes(b"half")
        raise KeyboardInterrupt


def test_order_of_calls_is_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a flush after the rename it must precede, told as plainly as possible."""
    disk = RecordingDisk()
    monkeypatch.setattr(durable, "DISK", disk)
    durable.replace_file(tmp_path / "a", b"content")
    temporary = disk.log[0].path
    steps = [(event.kind, event.path) for event in disk.log]
    assert steps == [
        ("create", temporary), ("write", temporary), ("sync", temporary), ("rename", temporary),
        ("sync", tmp_path),
    ]  # fmt: skip
    assert temporary.parent == tmp_path
    assert temporary.name.startswith(durable.TEMPORARY)


def test_macos_flushes_the_drive_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: plain fsync on macOS, which leaves data in the drive's volatile cache."""
    import fcntl

    calls: list[object] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: calls.append(command))
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync"))
    durable.replace_file(tmp_path / "a", b"content")
    assert calls == [51, 51]


def test_append_closes_a_torn_line_first(tmp_path: Path) -> None:
    """Guards: a line torn by a crash that swallows the next one."""
    path = tmp_path / "log"
    durable.append_line(path, b"1")
    with path.open("ab") as file:
        file.write(b"tor")
    durable.append_line(path, b"2")
    durable.append_line(path, b"3")
    assert path.read_bytes() == b"1\ntor\n2\n3\n"


def test_stale_cleaning_restores_removes_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a replaced directory that a crash left nameless; one bad entry that stops all; a
    user's own files taken for ours where a run lies among them."""
    for name in (
        ".old-0a1b2c3d-lost",
        ".old-0a1b2c3d-present",
        ".tmp-new-0a1b2c3d",
        "present",
        "x",
    ):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / ".tmp-file-0a1b2c3d").write_bytes(b"")
    for name in (".hidden", ".old-letters", ".tmp-notes", ".old-photos-2019", ".tmp-new-0A1B2C3D"):
        (tmp_path / name).write_bytes(b"the user's")
    removing = durable.Disk.unlink

    def unlink(self: durable.Disk, path: Path) -> None:
        if "tmp-file" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        removing(self, path)

    monkeypatch.setattr(durable.Disk, "unlink", unlink)
    assert durable.clean_stale(tmp_path) == [
        "restored lost",
        "removed .old-0a1b2c3d-present",
        "could not tidy .tmp-file-0a1b2c3d: Permission denied",
        "removed .tmp-new-0a1b2c3d",
    ]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        ".hidden", ".old-letters", ".tmp-notes", ".old-photos-2019", ".tmp-new-0A1B2C3D",
        ".tmp-file-0a1b2c3d", "lost", "present", "x",
    }  # fmt: skip
    assert durable.clean_stale(tmp_path / "missing") == []


def test_remove_tree_follows_no_link_and_takes_the_manifest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: files outside that are deleted through a link; half a checkpoint that looks whole."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_bytes(b"1")
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "a").write_bytes(b"1")
    (folder / "manifest.json").write_bytes(b"{}")
    disk = RecordingDisk()
    monkeypatch.setattr(durable, "DISK", disk)
    durable.remove_tree(folder)
    assert not folder.exists()
    assert (tmp_path / "outside" / "precious").exists()
    first_two = [(event.kind, event.path) for event in disk.log[:2]]
    assert first_two == [("remove", folder / "manifest.json"), ("sync", folder)]


FILE_LIMIT = """
import resource, signal, sys
from pathlib import Path
from solollm import durable
from solollm.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    durable.replace_file(Path(sys.argv[1]), bytes(200_000))
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_real_file_size_limit_keeps_the_old_file(tmp_path: Path) -> None:
    """Guards: fakes that fail otherwise than a real system does."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    result = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 74, result
    assert "ulimit -f" in result.stdout
    assert contents(tmp_path) == {"a": b"old"}
