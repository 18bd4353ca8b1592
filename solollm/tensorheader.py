"""The header of a safetensors file: validated before a byte behind it is believed, and written.

Every loader of this product stands behind `parse_header`; the frameworks' own parsers do not all
check (a crafted 150-byte file ends MLX by a signal). It refuses everything that the reference
parser (Rust, `safetensors` 0.8) refuses, and more: duplicate keys, absurd names, tensors or
dimensions without end. The layout is the format's own: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from solollm.strictfile import parse_json, refused

MAX_HEADER_BYTES = 100_000_000  # the reference parser's cap
MAX_TENSORS = 100_000
MAX_DIMS = 16
MAX_NAME_CHARACTERS = 512
_MAX_COMMAS = 16 * MAX_TENSORS
_MAX_WIDE_BYTES = 1 << 24
_MAX_ELEMENTS = 2**60
_METADATA = "__metadata__"

# Bytes per element. Only those of `backend.DType` can be loaded; foreign files may hold others.
FILE_DTYPES: Mapping[str, int] = {
    "F32": 4, "F16": 2, "BF16": 2, "I16": 2, "I32": 4, "U32": 4, "U8": 1,
    "F64": 8, "I64": 8, "U64": 8, "U16": 2, "I8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


class TensorInfo(NamedTuple):
    """Where a tensor lies: its bytes are [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """A validated header. `tensors` is ordered by place in the file; `raw` is the length prefix
    and the JSON text, as they stand in the file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    raw: bytes | bytearray


def header_length(prefix: bytes | bytearray, file_bytes: int, path: Path) -> int:
    """The length of the JSON text, from the file's first 8 bytes. Raises IntegrityError."""
    if file_bytes < 8:
        raise refused(path, "byte 0", f"{file_bytes} bytes are too few for a safetensors file")
    length = int(struct.unpack("<Q", prefix)[0])
    if length > MAX_HEADER_BYTES:
        raise refused(path, "byte 0", f"a header of {length:,} bytes, over {MAX_HEADER_BYTES:,}")
    if length < 2 or 8 + length > file_bytes:
        raise refused(path, "byte 0", f"a header of {length} bytes in a file of {file_bytes}")
    return length


def parse_header(raw: bytes | bytearray, file_bytes: int, path: Path) -> Header:
    """Validate the length prefix and JSON text `raw` of a file of `file_bytes` bytes.

    Raises:
        IntegrityError: names the path, the place and the reason.
    """
    text = memoryview(raw)[8:]
    _refuse_bombs(raw, path)
    if text[0] != ord("{"):
        raise refused(path, "byte 8", "the header does not begin with `{`")
    table = parse_json(text, path, "the header")
    metadata = _read_metadata(table.pop(_METADATA, None), path)
    origin = len(raw)
    infos = {name: _read_tensor(name, entry, origin, path) for name, entry in table.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: item[1][2:]))
    place = origin
    for name, info in ordered.items():
        if info.begin != place:
            kind = "overlaps the one before" if info.begin < place else "leaves a hole before it"
            raise refused(path, f"tensor {name!r}", f"{kind} (byte {info.begin}, not {place})")
        place = info.end
    if place != file_bytes:
        kind = "bytes follow the last tensor" if place < file_bytes else "the file is cut short"
        raise refused(path, f"byte {min(place, file_bytes)}", f"{kind} ({place} != {file_bytes})")
    return Header(ordered, metadata, raw)


def build_header(specs: Sequence[Spec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length prefix and JSON text for tensors that follow in this order, padded to 8 bytes."""
    table: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape in specs:
        end = begin + spec_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def spec_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    size = FILE_DTYPES[dtype]
    for dim in shape:
        size *= dim
    return size


def _refuse_bombs(raw: bytes | bytearray, path: Path) -> None:
    """Bound the work before parsing: brackets and commas can only be over-counted here."""
    tensors = raw.count(b"{")
    if tensors > MAX_TENSORS + 2:
        raise refused(path, "the header", f"about {tensors:,} tensors, over {MAX_TENSORS:,}")
    if len(raw) > _MAX_WIDE_BYTES and (b"\\" in raw or not raw[8:].isascii()):
        # One wide character makes Python spend four bytes on every other of its string.
        raise refused(path, "the header", f"over {_MAX_WIDE_BYTES:,} bytes and not plain ASCII")
    if raw.count(b",") > _MAX_COMMAS or raw.count(b"[") > 2 * MAX_TENSORS + 2:
        raise refused(path, "the header", "too many values for a header")


def _read_metadata(value: object, path: Path) -> dict[str, str]:
    if value is None:  # MLX writes a null where there is nothing to say
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise refused(path, _METADATA, "is not a table of strings")
    for text in (*value, *value.values()):
        _refuse_surrogates(text, path, _METADATA)
    return value


def _read_tensor(name: str, entry: object, origin: int, path: Path) -> TensorInfo:
    place = f"tensor {name[:80]!r}"
    _check_name(name, path, place)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refused(path, place, "is not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FILE_DTYPES:
        raise refused(path, place, f"the dtype {str(dtype)[:40]!r} is unknown here")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise refused(path, place, f"the shape is no list of at most {MAX_DIMS} numbers")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise refused(path, place, "data_offsets is no pair")
    if any(type(number) is not int or number < 0 for number in (*shape, *offsets)):
        raise refused(path, place, "a dimension or offset is no natural number")
    begin, end = offsets
    elements = 1
    for dim in shape:
        elements *= dim
        # As in the reference parser the product is checked at every step, before a zero hides it.
        if elements > _MAX_ELEMENTS or dim > _MAX_ELEMENTS:
            raise refused(path, place, f"the shape {shape} overflows")
    if end - begin != elements * FILE_DTYPES[dtype]:
        wanted = elements * FILE_DTYPES[dtype]
        raise refused(path, place, f"{dtype} {shape} is {wanted} bytes, not {end - begin}")
    return TensorInfo(dtype, tuple(shape), origin + begin, origin + end)


def _check_name(name: str, path: Path, place: str) -> None:
    _refuse_surrogates(name, path, "a tensor name")
    if not name or len(name) > MAX_NAME_CHARACTERS:
        raise refused(path, place, f"a name of {len(name):,} characters")
    if not name.isprintable() or "\\" in name:
        raise refused(path, place, "the name holds a control character or a backslash")
    if name.startswith("/") or ".." in name.split("/"):
        raise refused(path, place, "the name is a path that leads outside")


def _refuse_surrogates(text: str, path: Path, place: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise refused(path, place, "holds half a character (a lone surrogate)") from None
