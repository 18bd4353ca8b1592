"""The `.solo` archive: an uncompressed tar in which every byte is accounted for.

First `bundle.json`, then the files it lists, in its order. Any tar program can look inside or
unpack it. Written are the plainest headers there are (ustar, mode 0644, no owner, no time), and
read is nothing else: each header must be, to the byte, the one that this module would write for the
name and size that the list promises. So there are no links, devices, sparse files, long-name
tricks, second entries or bytes after the end, and no header field that could carry one.

Files of 8 GiB and more have their size in base 256, as GNU tar and bsdtar write it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from solollm import durable
from solollm.bundle import BUNDLE, MAX_BYTES, Bundle, FileRecord, encode, parse
from solollm.errors import IntegrityError
from solollm.strictfile import open_regular, read_at, refused

Source = Path | bytes
Piece = bytes | memoryview

_BLOCK = 512
_PIECE_BYTES = 1 << 22
_OCTAL_LIMIT = 8**11
_END = bytes(2 * _BLOCK)


def hash_source(source: Source) -> FileRecord:
    """Size and digest of a file, read in pieces, or of bytes. Raises IntegrityError."""
    state, size = hashlib.sha256(), 0
    for piece in pieces(source):
        state.update(piece)
        size += len(piece)
    return FileRecord(bytes=size, sha256=state.hexdigest())


def pieces(source: Source) -> Iterator[Piece]:
    """The content, some megabytes at a time. A link is refused: it may lead anywhere."""
    if isinstance(source, bytes):
        yield source
        return
    fd, size = open_regular(source, follow_links=False)
    try:
        buffer = memoryview(bytearray(min(size, _PIECE_BYTES)))
        for place in range(0, size, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, size - place)]
            read_at(fd, piece, place, source)
            yield piece
    finally:
        os.close(fd)


def write_archive(path: Path, bundle: Bundle, sources: Mapping[str, Source]) -> int:
    """Stream the files of `bundle` into a new archive, which appears whole or not at all; returns
    its bytes.

    Raises:
        StorageError: no room, or the disk fails; what stood at `path` still does.
        IntegrityError: a file is not what the bundle says of it, any more.
    """
    listing = encode(bundle)
    expected = sum(_padded(file.bytes) + _BLOCK for file in bundle.files.values())
    expected += _padded(len(listing)) + _BLOCK + len(_END)
    durable.make_directory(path.parent)
    durable.require_space(path.parent, expected)

    def content() -> Iterator[Piece]:
        yield from _entry(BUNDLE, len(listing), [listing])
        for name, record in bundle.files.items():
            yield from _entry(name, record.bytes, _proven(name, record, sources[name]))
        yield _END

    durable.replace_file(path, content())
    return expected


class ArchiveReader:
    """An archive opened for reading; `bundle` is its list, checked. A context manager.

    Raises:
        IntegrityError: no archive of ours, damaged, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd, self._size = open_regular(path)
        self._at = 0
        try:
            self.bundle = self._read_bundle()
            self._check_size()
        except BaseException:
            os.close(self._fd)
            raise

    def extract(self, wanted: Callable[[str], Path | None]) -> dict[str, IntegrityError]:
        """Read every file, and write those for which `wanted` gives a place, inside a staged
        directory. Returns the files whose content is not what was promised.

        Raises:
            IntegrityError: a header, the padding or the end is not as it was written.
            StorageError: from the disk.
        """
        damaged: dict[str, IntegrityError] = {}
        for name, record in self.bundle.files.items():
            self._expect(_header(name, record.bytes), f"the header of {name}")
            target = wanted(name)
            digest = self._copy(record.bytes, target)
            if digest != record.sha256:
                damaged[name] = refused(self.path, name, "is damaged (its digest differs)")
            self._expect(bytes(_padded(record.bytes) - record.bytes), f"the padding after {name}")
        self._expect(_END, "the end of the archive")
        return damaged

    def __enter__(self) -> ArchiveReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def _read_bundle(self) -> Bundle:
        head = self._read(min(_BLOCK, self._size), "the first header")
        size = _size_of(head)
        if size is None or head != _header(BUNDLE, size) or size > MAX_BYTES:
            raise refused(
                self.path, "the first 512 bytes", "are not the start of a packed run",
                fix="`solollm runs pack RUN FILE` makes one",
            )  # fmt: skip
        content = self._read(size, BUNDLE)
        bundle = parse(content, self.path)
        self._expect(bytes(_padded(size) - size), f"the padding after {BUNDLE}")
        return bundle

    def _check_size(self) -> None:
        rest = sum(_BLOCK + _padded(file.bytes) for file in self.bundle.files.values())
        expected = self._at + rest + len(_END)
        if self._size != expected:
            reason = f"{self._size:,} bytes, its list adds up to {expected:,}"
            raise refused(self.path, "the size", reason, fix="copy it again: it was cut or grew")

    def _copy(self, size: int, target: Path | None) -> str:
        state = hashlib.sha256()
        if target is None:
            for piece in self._pieces(size):
                state.update(piece)
            return state.hexdigest()
        with durable.create_file(target, expected_bytes=size) as file:
            for piece in self._pieces(size):
                state.update(piece)
                file.write(piece)
        return state.hexdigest()

    def _pieces(self, size: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(size, _PIECE_BYTES)))
        for place in range(0, size, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, size - place)]
            read_at(self._fd, piece, self._at, self.path)
            self._at += len(piece)
            yield piece

    def _read(self, size: int, what: str) -> bytes:
        if self._at + size > self._size:
            raise refused(self.path, what, "the file ends in it")
        content = bytearray(size)
        read_at(self._fd, memoryview(content), self._at, self.path)
        self._at += size
        return bytes(content)

    def _expect(self, content: bytes, what: str) -> None:
        if self._read(len(content), what) != content:
            raise refused(self.path, what, "is not as it was written")


def _entry(name: str, size: int, content: Iterator[Piece] | list[bytes]) -> Iterator[Piece]:
    yield _header(name, size)
    yield from content
    yield bytes(_padded(size) - size)


def _proven(name: str, record: FileRecord, source: Source) -> Iterator[Piece]:
    """The pieces of a file, which must be the recorded ones in the end."""
    state, size = hashlib.sha256(), 0
    for piece in pieces(source):
        state.update(piece)
        size += len(piece)
        yield piece
    if (size, state.hexdigest()) != (record.bytes, record.sha256):
        place = source if isinstance(source, Path) else Path(name)
        raise refused(place, "the content", "changed while it was packed", fix="pack again")


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _header(path: str, size: int) -> bytes:
    """The one header of a plain file (POSIX.1-1988 ustar)."""
    folder, _, name = ("", "", path) if len(path) <= 100 else path.rpartition("/")
    assert 0 < len(name) <= 100, path
    assert len(folder) <= 155, path
    fields = [
        name.encode("ascii").ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,
        f"{size:011o}\0".encode() if size < _OCTAL_LIMIT else b"\x80" + size.to_bytes(11, "big"),
        b"00000000000\0",
        b" " * 8,  # where the checksum goes, which counts it as blanks
        b"0" + bytes(100),
        b"ustar\0" + b"00" + bytes(80),
        folder.encode("ascii").ljust(167, b"\0"),
    ]
    blank = b"".join(fields)
    assert len(blank) == _BLOCK, len(blank)
    return blank[:148] + f"{sum(blank):06o}\0 ".encode() + blank[156:]


def _size_of(header: bytes) -> int | None:
    """The octal size in a header; None where there is none."""
    try:
        return int(header[124:135].decode("ascii"), 8)
    except ValueError:
        return None
