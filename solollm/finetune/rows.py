"""Rows of instruction data: JSON lines, JSON arrays, Parquet tables, Hugging Face datasets.

Curation tolerates broken items of a corpus; here every row was written on purpose, so that one
that cannot be read is a reason to stop, by file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from solollm.data.blocks import byte_lines, read_blocks
from solollm.data.formats import FileKind, file_kind
from solollm.data.items import Limits, Unreadable
from solollm.data.sources import check_sources, hub_rows
from solollm.errors import ConfigError, DataError
from solollm.finetune.shapes import kind_of
from solollm.strictfile import unique_keys

MAX_ROW_BYTES = 1 << 24
_READ = ("jsonl", "json", "parquet")


class Row(NamedTuple):
    """One row: where it stands (`train.jsonl:17`), what it holds, or why it cannot be read."""

    place: str
    value: Mapping[str, Any]
    problem: str = ""


def read_rows(sources: Sequence[str]) -> Iterator[Row]:
    """Every row of files, folders and `hf://owner/name[/config][:split]`, in a fixed order.

    Raises:
        ConfigError: a source that does not exist or is of no readable kind.
        DataError: a file that cannot be read to its end, or a dataset that stops half-way.
    """
    check_sources(sources)
    for source in sources:
        if source.startswith("hf://"):
            for number, value in enumerate(hub_rows(source), 1):
                yield _row(f"{source} row {number}", value)
            continue
        for path, kind in _files(Path(source)):
            yield from _read(path, kind)


def row_texts(sources: Sequence[str]) -> Iterator[str]:
    """All that each row says: its strings, of whatever fields, in their order, a line each.

    Raises:
        ConfigError, DataError: as `read_rows`, and for a row that cannot be read.
    """
    for row in read_rows(sources):
        if row.problem:
            raise DataError(f"{row.place} {row.problem}", fix="mend the row, or take it out")
        yield "\n".join(_strings(row.value))


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += reversed([*value.values()])
        elif isinstance(value, list | tuple):
            waiting += reversed(value)


def _files(path: Path) -> list[tuple[Path, FileKind]]:
    paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    kinds = [(p, file_kind(p.name)) for p in paths if not p.name.startswith(".")]
    found = [(p, kind) for p, kind in kinds if kind is not None and kind.format in _READ]
    if not found:
        raise ConfigError(
            f"{path} holds no rows that can be read",
            why="a row comes from .jsonl, .json or .parquet (.jsonl also as .gz or .zst)",
            fix="give such a file, a folder of them, or hf://owner/name",
        )
    return found


def _read(path: Path, kind: FileKind) -> Iterator[Row]:
    try:
        if kind.format == "parquet":
            yield from _parquet(path)
        elif kind.format == "json":
            yield from _json(path, kind)
        else:
            yield from _lines(path, kind)
    except Unreadable as error:
        raise DataError(
            f"{path} cannot be read to its end",
            why=f"{error.reason} {error.detail}".strip(),
            fix="a run never starts on half of its data: get the file again",
        ) from error


def _lines(path: Path, kind: FileKind) -> Iterator[Row]:
    blocks = read_blocks(path, kind.compression, Limits())
    for number, line in enumerate(byte_lines(blocks, MAX_ROW_BYTES), 1):
        place = f"{path.name}:{number}"
        if line is None:
            yield Row(place, {}, f"the line is longer than {MAX_ROW_BYTES:,} bytes")
        elif line.strip():
            yield _parsed(place, line)


def _json(path: Path, kind: FileKind) -> Iterator[Row]:
    """An array of rows, or what is really JSON lines."""
    content = b"".join(read_blocks(path, kind.compression, Limits()))
    if not content.lstrip().startswith(b"["):
        yield from _lines(path, kind)
        return
    try:
        values = json.loads(content, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        yield Row(path.name, {}, f"is no JSON: {error}")
        return
    for number, value in enumerate(values, 1):
        yield _row(f"{path.name} item {number}", value)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the package pyarrow", fix="pip install 'solollm[data]'"
        ) from error
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches(batch_size=256):
            for value in batch.to_pylist():
                number += 1
                yield _row(f"{path.name} row {number}", value)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read after row {number}", why=str(error), fix="get the file again"
        ) from error


def _parsed(place: str, line: bytes) -> Row:
    try:
        value = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        return Row(place, {}, f"is no JSON: {_in_line(error)}")
    return _row(place, value)


def _in_line(error: Exception) -> str:
    """What is wrong and in which column: the parser calls every line the first."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, at character {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"{error.object[error.start : error.start + 1]!r} at byte {error.start} is no UTF-8"
    return str(error)


def _row(place: str, value: Any) -> Row:
    if not isinstance(value, Mapping):
        return Row(place, {}, f"is {kind_of(value)}, not an object")
    return Row(place, value)
