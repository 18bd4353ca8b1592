"""A file as a stream of bounded blocks: opening, decompressing, decoding, cutting into pieces.

Whatever a file holds, what is held of it at once is bounded: by a block, a line limit, a piece.
All functions raise `Unreadable` where the rest of a file cannot be used.
"""

from __future__ import annotations

import codecs
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol

from solollm.data.items import Limits, Unreadable
from solollm.errors import ConfigError

COMPRESSIONS = (".gz", ".zst")
_BLOCK_BYTES = 2**20
# Input fed at once. Deflate yields at most 1,032 bytes for one, zstd 128 KiB for 4: 32 MiB a feed.
_FEED_BYTES = {".gz": 2**14, ".zst": 2**10}
_MAX_ZSTD_WINDOW = 2**27
_BINARY_PROBE = 2**13
# The order matters: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def open_regular(path: Path) -> BinaryIO:
    """The file, opened. FIFOs and devices are refused without waiting for them."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise Unreadable("cannot be opened", str(getattr(error, "strerror", error))) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable("not a regular file")
    return os.fdopen(descriptor, "rb")


def read_blocks(path: Path, compression: str, limits: Limits) -> Iterator[bytes]:
    """The content of a file as UTF-8 bytes (UTF-16 and UTF-32 with a byte order mark are
    converted), decompressed if `compression` is .gz or .zst."""
    with open_regular(path) as file:
        plain = _read(file, compression, limits)
        yield from _as_utf8(plain)


def _read(file: BinaryIO, compression: str, limits: Limits) -> Iterator[bytes]:
    try:
        if compression:
            yield from _decompress(file, compression, limits)
        else:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise Unreadable("cannot be read", str(error.strerror)) from error


def _decompress(file: BinaryIO, compression: str, limits: Limits) -> Iterator[bytes]:
    create, failure = _decompressor(compression)
    stream = create()
    consumed = produced = 0
    rest = b""
    while chunk := rest or file.read(_FEED_BYTES[compression]):
        if not rest:
            consumed += len(chunk)
        if stream.eof:  # another member follows, or the zeros that tapes are padded with
            chunk = chunk.lstrip(b"\0")
            stream = create() if chunk else stream
        rest = b""
        if not chunk:
            continue
        try:
            block = stream.decompress(chunk)
        except failure as error:
            raise Unreadable("damaged compression", str(error)) from error
        rest = stream.unused_data if stream.eof else b""
        produced += len(block)
        _refuse_bomb(consumed, produced, limits)
        if block:
            yield block
    if not stream.eof:
        raise Unreadable("cut short", f"the {compression} stream does not end")


def _refuse_bomb(consumed: int, produced: int, limits: Limits) -> None:
    if produced > limits.max_decompressed_bytes:
        raise Unreadable("decompresses to too much", f"over {limits.max_decompressed_bytes} bytes")
    if produced > limits.ratio_after_bytes and produced > limits.max_ratio * consumed:
        raise Unreadable(
            "decompression bomb", f"{consumed} bytes became {produced}, over {limits.max_ratio}:1"
        )


def _decompressor(compression: str) -> tuple[Callable[[], _Decompressor], type[Exception]]:
    if compression == ".gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(
            "a .zst file needs the package zstandard", fix="pip install 'solollm[data]'"
        ) from error
    context = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
    return context.decompressobj, zstandard.ZstdError


def _as_utf8(blocks: Iterator[bytes]) -> Iterator[bytes]:
    head = b""
    for block in blocks:
        head += block
        if len(head) >= _BINARY_PROBE:
            break
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            yield from _transcode(chain([head[len(mark) :]], blocks), encoding)
            return
    if b"\0" in head[:_BINARY_PROBE]:
        raise Unreadable("binary file")
    yield head.removeprefix(codecs.BOM_UTF8)
    yield from blocks


def _transcode(blocks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    for text in _decode(blocks, encoding):
        yield text.encode()


def _decode(blocks: Iterable[bytes], encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    consumed = 0
    for block in chain(blocks, [b""]):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            where = consumed - pending + error.start
            raise Unreadable(
                f"not {encoding.upper()}", f"{error.reason} at byte {where}"
            ) from error
        consumed += len(block)
        if text:
            yield text


def text_pieces(blocks: Iterable[bytes], max_chars: int) -> Iterator[str]:
    """UTF-8 blocks as text, whole if it has at most `max_chars` characters, else in pieces."""
    held = ""
    for text in _decode(filter(None, blocks), "utf-8"):
        held += text
        *pieces, held = split_text(held, max_chars)
        yield from pieces
    yield held


def split_text(text: str, max_chars: int) -> list[str]:
    """Pieces of at most `max_chars` whose concatenation is `text`; cut after the last blank line,
    newline or space in a piece's second half, or else anywhere."""
    pieces, start = [], 0
    while len(text) - start > max_chars:
        end = start + max_chars
        for separator in ("\n\n", "\n", " "):
            found = text.rfind(separator, start + max_chars // 2, end)
            if found >= 0:
                end = found + len(separator)
                break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def byte_lines(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Lines without their newline; None for one longer than `max_bytes`, which is not kept."""
    held: list[bytes] = []
    size = 0
    for block in blocks:
        for place, part in enumerate(block.split(b"\n")):
            if place:
                yield b"".join(held) if size <= max_bytes else None
                held, size = [], 0
            size += len(part)
            if size <= max_bytes:
                held.append(part)
    if size:
        yield b"".join(held) if size <= max_bytes else None


def decoded(blocks: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 blocks as text, in pieces of any length."""
    return _decode(filter(None, blocks), "utf-8")
