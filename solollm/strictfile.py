"""Reading files that others may have made: regular files only, capped, JSON without surprises.

Python's own `json` lets duplicate keys, NaN, lone surrogates and "-0" through, and answers deep
nesting and huge integers with errors of three different kinds; here every one of them is an
IntegrityError that names the file. The header of a safetensors file is checked further in
`solollm.tensorheader`.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from solollm.errors import IntegrityError

_MAX_JSON_BYTES = 64 << 20
_MAX_DIGITS = 32  # of an integer: 2^64 has 20, and transformers writes 10^30 for "no limit"
_READ_BYTES = 1 << 26  # per call: macOS refuses reads of 2 GB and more


def open_regular(path: Path, *, follow_links: bool = True) -> tuple[int, int]:
    """(file descriptor, size in bytes) of a regular file. A FIFO or device never blocks.

    Raises:
        IntegrityError: no such file, not a regular file, or a link with `follow_links=False`.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags | (0 if follow_links else os.O_NOFOLLOW))
    except (OSError, ValueError) as error:
        if path.is_symlink() and not follow_links:
            raise refused(path, "the file", "is a symbolic link, which may lead anywhere") from None
        raise refused(path, "the file", f"cannot be opened: {_reason(error)}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise refused(path, "the file", "is not a regular file")
    return fd, status.st_size


def read_at(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` (bytes) from `offset`. Raises IntegrityError if the file ends before."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done : done + _READ_BYTES]], offset + done)
        except OSError as error:
            raise refused(path, f"byte {offset + done}", f"unreadable: {_reason(error)}") from error
        if count == 0:
            raise refused(
                path, f"byte {offset + done}", "the file ends here, cut while it was read"
            )
        done += count


def read_bytes(path: Path, *, max_bytes: int = _MAX_JSON_BYTES, follow_links: bool = True) -> bytes:
    """The whole content. Raises IntegrityError for more than `max_bytes` or no regular file."""
    fd, size = open_regular(path, follow_links=follow_links)
    try:
        if size > max_bytes:
            raise refused(path, "the file", f"has {size:,} bytes, more than {max_bytes:,}")
        content = bytearray(size)
        read_at(fd, memoryview(content), 0, path)
        return bytes(content)
    finally:
        os.close(fd)


def parse_json(
    content: bytes | bytearray | memoryview, path: Path, place: str = "the JSON text"
) -> Any:
    """The value of strict JSON: valid UTF-8 without BOM, no key twice, finite numbers, integers of
    at most 32 digits and without a minus sign before zero. Raises IntegrityError."""
    try:
        return strict_json(content)
    except ValueError as error:
        raise refused(path, place, str(error)[:200]) from None


def read_table(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises IntegrityError."""
    table = parse_json(read_bytes(path), path)
    if not isinstance(table, dict):
        raise refused(path, "the JSON text", "is no table")
    return table


def strict_json(content: bytes | bytearray | memoryview) -> Any:
    """`parse_json` of what came from elsewhere than a file. Raises ValueError."""
    try:
        return json.loads(
            str(content, "utf-8"),
            object_pairs_hook=unique_keys,
            parse_int=_integer,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def encode_json(value: Any) -> bytes:
    """`value` as indented JSON with a final newline; the one spelling of each file we write."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def refused(path: Path, place: str, reason: str, *, fix: str = "") -> IntegrityError:
    """The error for a file that will not be used: path, place in it, reason."""
    advice = fix or "get the file again from where it came"
    return IntegrityError(f"{path} is refused", why=f"{place}: {reason}", fix=advice)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for `json.loads`; raises ValueError for a key that stands twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return table


def _integer(text: str) -> int:
    digits = text.removeprefix("-")
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    if text == "-0":
        raise ValueError("the integer -0")
    return int(text)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")
