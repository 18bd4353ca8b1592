"""The documents of one file: plain text, JSON lines, a JSON array, a Parquet table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from solollm.data.blocks import (
    COMPRESSIONS,
    byte_lines,
    decoded,
    open_regular,
    read_blocks,
    split_text,
    text_pieces,
)
from solollm.data.items import Broken, Document, Item, Limits, Unreadable, excerpt
from solollm.errors import ConfigError

TEXT_SUFFIXES = frozenset(
    (
        ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".py", ".pyi", ".c", ".h", ".cc",
        ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".swift", ".kt", ".sh", ".sql",
    )
)  # fmt: skip
_JSON_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
_BETWEEN_ELEMENTS = re.compile(r"[ \t\r\n,]*")
_ROWS_AT_ONCE = 32  # of a Parquet table; each may be as long as its author likes


class FileKind(NamedTuple):
    """`format` is text, jsonl, json or parquet; `compression` .gz, .zst or empty."""

    format: str
    compression: str


def file_kind(name: str) -> FileKind | None:
    """What a file's name says it holds; None for nothing that is read here."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    last = suffixes[-1] if suffixes else ""
    if last in TEXT_SUFFIXES:
        return FileKind("text", compression)
    if last in _JSON_SUFFIXES:
        return FileKind(_JSON_SUFFIXES[last], compression)
    if last == ".parquet" and not compression:
        return FileKind("parquet", "")
    return None


def named_kind(name: str) -> FileKind:
    """The same of a file that was named by hand: what is not known is text."""
    suffix = Path(name).suffix.lower()
    return file_kind(name) or FileKind("text", suffix if suffix in COMPRESSIONS else "")


def unread_type(name: str) -> str:
    """How a report calls a file that `file_kind` does not know: by its suffixes."""
    path = Path(name)
    packed = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    inner = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    return f"{inner or '(no suffix)'}{f' in {packed}' if packed else ''}"


def read_file(path: Path, label: str, kind: FileKind, limits: Limits) -> Iterator[Item]:
    """Everything a file holds. What cannot be read becomes `Broken`, never an exception.

    Raises:
        ConfigError: the format needs a package that is not installed.
    """
    items = _READERS[kind.format]
    count = 0
    try:
        for item in items(path, label, kind, limits):
            count += 1
            yield item
    except Unreadable as error:
        place = f"after item {count}" if count else ""
        yield Broken(label, place, error.reason, error.detail)


def record_items(record: Any, label: str, place: str, limits: Limits) -> Iterator[Item]:
    """The document of one JSON object, table row or dataset row. Any: it is foreign data."""
    if not isinstance(record, Mapping):
        yield Broken(label, place, "not a JSON object", type(record).__name__)
        return
    field = next((name for name in limits.text_fields if name in record), None)
    if field is None:
        names = ", ".join(str(name) for name in islice(record, 10))
        yield Broken(label, place, "no text field", excerpt(f"it has: {names}"))
        return
    if not isinstance(record[field], str):
        yield Broken(label, place, "text is not a string", type(record[field]).__name__)
        return
    pieces = split_text(record[field], limits.max_document_chars)
    for number, piece in enumerate(pieces, 1):
        part = f"{place} part {number}" if len(pieces) > 1 else place
        yield Document(piece, label, part)


def _read_text(path: Path, label: str, kind: FileKind, limits: Limits) -> Iterator[Item]:
    blocks = read_blocks(path, kind.compression, limits)
    for number, piece in enumerate(text_pieces(blocks, limits.max_document_chars), 1):
        yield Document(piece, label, f"part {number}" if number > 1 else "")


def _read_lines(path: Path, label: str, kind: FileKind, limits: Limits) -> Iterator[Item]:
    yield from _json_lines(read_blocks(path, kind.compression, limits), label, limits)


def _read_json(path: Path, label: str, kind: FileKind, limits: Limits) -> Iterator[Item]:
    """An array of objects, JSON lines, or one object over several lines."""
    blocks = read_blocks(path, kind.compression, limits)
    head = next((head for head in map(bytes.lstrip, blocks) if head), b"")
    content: Iterator[bytes] = chain([head], blocks)
    if head.startswith(b"["):
        for number, value in enumerate(_array_elements(decoded(content), limits), 1):
            yield from record_items(value, label, f"item {number}", limits)
        return
    first_line, newline, _ = head.partition(b"\n")
    if newline and not _is_json(first_line):
        content = (block.replace(b"\n", b" ") for block in content)  # the whole file is one line
    yield from _json_lines(content, label, limits)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(blocks: Iterator[bytes], label: str, limits: Limits) -> Iterator[Item]:
    for number, line in enumerate(byte_lines(blocks, limits.max_line_bytes), 1):
        place = f"line {number}"
        if line is None:
            yield Broken(label, place, "line too long", f"over {limits.max_line_bytes} bytes")
        elif line.strip():
            yield from _line_items(line, label, place, limits)


def _line_items(line: bytes, label: str, place: str, limits: Limits) -> Iterator[Item]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        detail = f"{error.reason} at byte {error.start}"
        yield Broken(label, place, "not UTF-8", detail, excerpt(line))
    except RecursionError:
        yield Broken(label, place, "JSON nested too deep", excerpt=excerpt(line))
    except ValueError as error:  # an integer of 5,000 digits is a plain ValueError
        yield Broken(label, place, "not JSON", excerpt(str(error)), excerpt(line))
    else:
        yield from record_items(record, label, place, limits)


def _array_elements(texts: Iterator[str], limits: Limits) -> Iterator[Any]:
    """The elements of one JSON array, holding one at a time."""
    decoder = json.JSONDecoder()
    held, at = next(texts), 1  # past the bracket
    while True:
        match = _BETWEEN_ELEMENTS.match(held, at)
        at = match.end() if match else at
        if held.startswith("]", at):
            return
        try:
            value, at = decoder.raw_decode(held, at)
        except RecursionError as error:
            raise Unreadable("JSON nested too deep") from error
        except ValueError as error:
            held, at = held[at:], 0
            room = limits.max_line_bytes - len(held)
            if room <= 0:
                raise Unreadable("JSON element too long", f"over {len(held)} characters") from error
            more = _at_least(texts, min(len(held), room))
            if not more:
                raise Unreadable("not JSON", excerpt(str(error))) from error
            held += more
        else:
            yield value


def _at_least(texts: Iterator[str], length: int) -> str:
    """As much again as is already there, so that retries cost linear time in all."""
    pieces: list[str] = []
    size = 0
    for text in texts:
        pieces.append(text)
        size += len(text)
        if size >= length:
            break
    return "".join(pieces)


def _read_parquet(path: Path, label: str, kind: FileKind, limits: Limits) -> Iterator[Item]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(
            "a .parquet file needs the package pyarrow", fix="pip install 'solollm[data]'"
        ) from error
    with open_regular(path) as file:
        try:
            table = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
            names = table.schema_arrow.names
        except Exception as error:  # pyarrow raises many kinds on damaged files
            raise Unreadable("damaged Parquet file", excerpt(str(error))) from error
        field = next((name for name in limits.text_fields if name in names), None)
        if field is None:
            raise Unreadable("no text field", excerpt(f"its columns: {', '.join(names)}"))
        for number, row in enumerate(_rows(table, field), 1):
            yield from record_items({field: row}, label, f"row {number}", limits)


def _rows(table: Any, field: str) -> Iterator[Any]:
    """Values of one column. Any: pyarrow has no types, and the values are foreign."""
    try:
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[field], use_threads=False):
            for value in batch.column(0):
                yield value.as_py()
    except Exception as error:
        raise Unreadable("damaged Parquet file", excerpt(str(error))) from error


_READERS = {
    "text": _read_text, "jsonl": _read_lines, "json": _read_json, "parquet": _read_parquet,
}  # fmt: skip
