"""llama.cpp's file format, GGUF version 3: writing it, one tensor in memory at a time.

    magic, version, counts | metadata: key, type, value | tensors: name, shape, kind, offset | data

Everything is little-endian; every tensor's data begins at a multiple of 32 bytes. Source: ggml's
`docs/gguf.md`. What the metadata of a model are is the exporter's business.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from solollm import durable

ALIGNMENT = 32
Kind = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"]
Value = bool | int | float | str | Sequence[str] | Sequence[int]
_KINDS: Mapping[Kind, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class GgufTensor(NamedTuple):
    """What the file says of a tensor. `shape`: NumPy's, the last dimension is contiguous."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    num_bytes: int


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[GgufTensor],
    data: Iterable[np.ndarray],
) -> None:
    """Write the new file `path`. `data` brings the bits of `tensors`, in order.

    Raises:
        StorageError: the disk is full or failing.
    """
    head = _head(metadata, tensors)
    expected = len(head) + sum(_padded(tensor.num_bytes) for tensor in tensors)
    with durable.create_file(path, expected_bytes=expected) as file:
        file.write(head)
        for tensor, bits in zip(tensors, data, strict=True):
            assert bits.nbytes == tensor.num_bytes, (tensor, bits.nbytes)
            file.write(np.ascontiguousarray(bits).data.cast("B"))
            file.write(bytes(_padded(tensor.num_bytes) - tensor.num_bytes))


def gguf_bytes(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> int:
    """The size of the file."""
    return len(_head(metadata, tensors)) + sum(_padded(tensor.num_bytes) for tensor in tensors)


def _head(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, content = _encoded(value)
        parts += [_text(key), struct.pack("<I", kind), content]
    offset = 0
    for tensor in tensors:
        sizes = tuple(reversed(tensor.shape))  # the contiguous dimension comes first
        form = f"<I{len(sizes)}QIQ"
        parts.append(_text(tensor.name))
        parts.append(struct.pack(form, len(sizes), *sizes, _KINDS[tensor.kind], offset))
        offset += _padded(tensor.num_bytes)
    head = b"".join(parts)
    return head + bytes(_padded(len(head)) - len(head))


def _encoded(value: Value) -> tuple[int, bytes]:
    """A value's type, and its content."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _text(value)
    texts = [element for element in value if isinstance(element, str)]
    if len(texts) == len(value):
        content, kind = b"".join(map(_text, texts)), _STRING
    else:
        content, kind = np.array(value, "<i4").tobytes(), _INT32
    return _ARRAY, struct.pack("<IQ", kind, len(value)) + content


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
