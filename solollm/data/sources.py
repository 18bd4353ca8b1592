"""Where documents come from: files, folders, datasets on the Hugging Face hub, Python itself.

    notes.txt, dump.jsonl.zst, table.parquet    one file; an unknown suffix is read as plain text
    library/                                    a folder, all levels; links to folders not followed
    hf://owner/name[/config][:split]            streamed; needs the package `datasets`
    python://stdlib                             this Python's own library: text on every machine

A source that does not exist is the caller's mistake and raises; what is wrong inside one is an
item (see `solollm.data.items`).
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from solollm.data.formats import (
    FileKind,
    file_kind,
    named_kind,
    read_file,
    record_items,
    unread_type,
)
from solollm.data.items import Broken, Item, Limits, PassedOver, excerpt
from solollm.errors import ConfigError, DataError

STANDARD_LIBRARY = "python://stdlib"
_HUB = re.compile(r"hf://(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
_SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules", "site-packages"))
_NOT_LIBRARY = frozenset(
    (
        "test", "tests", "idle_test", "encodings", "lib2to3", "pydoc_data", "site-packages",
        "__pycache__",
    )
)  # fmt: skip
_MIN_LIBRARY_BYTES = 200


def read_documents(sources: Sequence[str], limits: Limits | None = None) -> Iterator[Item]:
    """Every item of every source, in order; a folder's files by name.

    Raises:
        ConfigError: a source that does not exist, or needs a package that is not installed.
        DataError: a hub dataset that stops half-way.
    """
    check_sources(sources)
    for source in sources:
        yield from read_source(source, limits or Limits())


def check_sources(sources: Sequence[str]) -> None:
    """Raises ConfigError for the first source that cannot be read at all."""
    if not sources:
        raise ConfigError("no sources", fix="name files, folders or hf://owner/name")
    for source in sources:
        if source == STANDARD_LIBRARY:
            continue
        if "://" in source:
            if not _HUB.fullmatch(source):
                raise ConfigError(
                    f"source {source!r} is not understood",
                    fix=f"write hf://owner/name[/config][:split] or {STANDARD_LIBRARY}",
                )
        elif not os.path.lexists(source):
            raise ConfigError(f"source {source} does not exist", fix="check the path")


def read_source(source: str, limits: Limits) -> Iterator[Item]:
    """Every item of one source."""
    if _HUB.fullmatch(source):
        yield from _read_hub(source, limits)
    elif source == STANDARD_LIBRARY:
        library = _library_folder()
        for path in standard_library_sources():
            label = f"python/{Path(path).relative_to(library).as_posix()}"
            yield from read_file(Path(path), label, FileKind("text", ""), limits)
    elif Path(source).is_dir():
        yield from _read_folder(Path(source), limits)
    else:
        name = Path(source).name
        yield from read_file(Path(source), _printable(name), named_kind(name), limits)


def standard_library_sources() -> list[str]:
    """The .py files of the running Python's standard library, without tests, codec tables, stubs
    of under 200 bytes, and the two packages that are mostly generated (lib2to3, pydoc_data)."""
    library = _library_folder()
    chosen = [
        path
        for path in library.rglob("*.py")
        if _NOT_LIBRARY.isdisjoint(path.relative_to(library).parts)
        and path.stat().st_size >= _MIN_LIBRARY_BYTES
    ]
    return [str(path) for path in sorted(chosen)]


def _library_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _read_folder(root: Path, limits: Limits) -> Iterator[Item]:
    for entry in _walk(root):
        if not isinstance(entry, Path):
            yield entry
            continue
        label = _label(root, entry)
        kind = file_kind(entry.name)
        if entry.name.startswith("."):
            yield PassedOver(label, "hidden")
        elif kind is None:
            yield PassedOver(label, f"file type {_printable(unread_type(entry.name))}")
        else:
            yield from read_file(entry, label, kind, limits)


def _walk(root: Path) -> Iterator[Path | PassedOver | Broken]:
    """Files below `root` in a fixed order, without recursion: folders may be thousands deep."""
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            detail = str(error.strerror)
            yield Broken(_label(root, folder), "", "folder cannot be listed", detail)
            continue
        inner = []
        for path in entries:
            if not os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a loop of links
                yield path
            elif path.is_symlink():
                yield PassedOver(_label(root, path), "linked folder")
            elif path.name.startswith(".") or path.name in _SKIPPED_FOLDERS:
                yield PassedOver(_label(root, path), "hidden or generated folder")
            else:
                inner.append(path)
        folders += reversed(inner)


def _label(root: Path, path: Path) -> str:
    return _printable(f"{root.resolve().name}/{path.relative_to(root).as_posix()}")


def _printable(name: str) -> str:
    """A file name as text that any encoder takes; names may hold any bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read_hub(source: str, limits: Limits) -> Iterator[Item]:
    for number, row in enumerate(hub_rows(source), 1):
        yield from record_items(row, source, f"row {number}", limits)


def hub_rows(source: str) -> Iterator[Any]:
    """Rows of the hub dataset `hf://owner/name[/config][:split]`, streamed. Any: `datasets` has no
    types. Raises DataError where it stops half-way."""
    named = _HUB.fullmatch(source)
    assert named is not None, "sources are checked before they are read"
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source} needs the package datasets", fix="pip install 'solollm[data]'"
        ) from error
    count = 0
    try:
        for row in datasets.load_dataset(
            named["name"], named["config"], split=named["split"] or "train", streaming=True
        ):
            count += 1
            yield row
    except (OSError, ValueError, RuntimeError) as error:
        # Not an item: half a dataset would silently be another corpus at every try.
        raise DataError(
            f"{source} cannot be read after {count} rows",
            why=excerpt(str(error)) or type(error).__name__,
            fix="check the name and the network (HF_TOKEN for private data), then run again",
        ) from error
