"""The items of a benchmark, or of any text that a model is to be measured on and not trained on.

Of a row the question counts, from the first of its fields that asks one (`ITEM_FIELDS`): answers
are often a word, and choices short phrases that any text may hold. CSV is read here, because
MMLU is published in it; all else by the readers of `solollm.data.sources`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from solollm.data.blocks import COMPRESSIONS, read_blocks
from solollm.data.formats import FileKind, file_kind, read_file
from solollm.data.items import Broken, Document, Item, Limits, Unreadable, excerpt
from solollm.data.sources import check_sources, read_source
from solollm.errors import ConfigError, DataError

# GSM8K, MMLU, ARC and most others: question; MATH: problem; HumanEval, MBPP: prompt; HellaSwag:
# ctx; PIQA: goal; WinoGrande: sentence; IFEval, LAMBADA: prompt, text.
ITEM_FIELDS = (
    "question", "problem", "prompt", "ctx", "goal", "sentence", "query", "instruction", "input",
    "text", "content",
)  # fmt: skip


def item_text(row: Mapping[str, Any]) -> str | None:
    """What a row of a benchmark asks; None: nothing that would be a text."""
    asked = next((row[name] for name in ITEM_FIELDS if name in row), None)
    return asked if isinstance(asked, str) else None


def read_items(source: str) -> Iterator[str]:
    """The items of a file, a folder or a hub dataset (`hf://owner/name:test`), in order.

    In a folder the tables and JSON lines count, or, where there are none, the texts; files of which
    no row asks anything (lists of tasks, settings) are passed over.

    Raises:
        ConfigError: it does not exist, or holds no item.
        DataError: a broken row: an item that is not looked for would stay in the corpus.
    """
    check_sources([source])
    count = 0
    for file in _files(source):
        for item in file:
            count += 1
            yield item
    if not count:
        raise ConfigError(
            f"{source} holds no items of a benchmark",
            why=f"looked for rows with one of the fields {', '.join(ITEM_FIELDS)}, and for texts",
            fix="name the file with its questions (.jsonl, .json, .parquet, .csv, .txt)",
        )


def _files(source: str) -> Iterator[Iterator[str]]:
    path = Path(source)
    limits = Limits(text_fields=ITEM_FIELDS)
    if "://" in source or not path.is_dir():
        packing = None if "://" in source else _packing_of_csv(path)
        yield _texts(read_source(source, limits)) if packing is None else _csv_items(path, packing)
        return
    kinds = {file: _kind(file) for file in sorted(path.rglob("*")) if file.is_file()}
    tables = {file: kind for file, kind in kinds.items() if kind and kind.format != "text"}
    for file, kind in (tables or kinds).items():
        if kind is None:
            continue
        if kind.format == "csv":
            yield _csv_items(file, kind.compression)
        else:
            yield _rows_that_ask(list(read_file(file, file.name, kind, limits)))


def _kind(file: Path) -> FileKind | None:
    packing = _packing_of_csv(file)
    return file_kind(file.name) if packing is None else FileKind("csv", packing)


def _packing_of_csv(file: Path) -> str | None:
    """.gz, .zst or empty; None: it is no CSV."""
    last = file.suffix.lower()
    packing = last if last in COMPRESSIONS else ""
    is_csv = (Path(file.stem).suffix.lower() if packing else last) == ".csv"
    return packing if is_csv else None


def _rows_that_ask(items: list[Item]) -> Iterator[str]:
    """A file of a folder: nothing, if it holds no item at all."""
    if all(isinstance(item, Broken) and item.reason == "no text field" for item in items):
        return iter(())
    return _texts(iter(items))


def _texts(items: Iterator[Item]) -> Iterator[str]:
    for item in items:
        if isinstance(item, Broken):
            raise _broken(f"{item.source} {item.place}".strip(), f"{item.reason} {item.detail}")
        if isinstance(item, Document) and item.text.strip():
            yield item.text


def _csv_items(path: Path, packing: str) -> Iterator[str]:
    """With the names of columns in the first row, or the question in the first column."""
    try:
        content = b"".join(read_blocks(path, packing, Limits())).decode("utf-8-sig")
    except Unreadable as error:
        raise _broken(path.name, f"{error.reason} {error.detail}") from error
    except UnicodeDecodeError as error:
        raise _broken(path.name, f"not UTF-8: {error.reason} at byte {error.start}") from error
    rows = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        first = next(filter(None, rows), [])
        column = _named_column(first)
        for row in rows if column is not None else chain([first], rows):
            if row and (column or 0) >= len(row):
                raise _broken(f"{path.name} line {rows.line_num}", "the question is missing")
            yield from row[column or 0 :][:1]
    except csv.Error as error:
        raise _broken(f"{path.name} line {rows.line_num}", str(error)) from error


def _named_column(row: list[str]) -> int | None:
    """The column of the question, if this row has the names of columns."""
    names = [name.strip().lower() for name in row]
    return next((names.index(name) for name in ITEM_FIELDS if name in names), None)


def _broken(place: str, problem: str) -> DataError:
    return DataError(
        f"{place}: {excerpt(problem.strip())}",
        why="an item that cannot be read is not looked for, and would stay in the corpus",
        fix="download the file again, or name the file with the items itself",
    )
