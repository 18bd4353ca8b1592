"""llama.cpp's codes of 8 and 4 bits, `Q8_0` and `Q4_0`, bit for bit as its `gguf` package has them.

A block of 32 neighbours in a row shares one float16 scale: `value = code * scale`. The formulas are
those of `ggml-quants.c`; that the bits are equal is tested. Its finer kinds (`Q4_K_M` and the like)
are made from such a file, or a float one, by its own `llama-quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

BLOCK = 32
BLOCK_BYTES: Mapping[int, int] = {8: 34, 4: 18}  # bits -> a scale of two bytes, and the codes
_BLOCKS_AT_ONCE = 1 << 15  # bounds the working memory


def quantize(values: np.ndarray, *, bits: int) -> np.ndarray:
    """float32 [rows, columns], columns a multiple of 32, to uint8 [rows, bytes of a row]."""
    rows, columns = values.shape
    assert columns % BLOCK == 0, columns
    blocks = values.reshape(-1, BLOCK)
    coded = np.empty((len(blocks), BLOCK_BYTES[bits]), np.uint8)
    for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
        part = slice(start, start + _BLOCKS_AT_ONCE)
        coded[part] = _CODES[bits](blocks[part])
    return coded.reshape(rows, -1)


def _codes_of_8(blocks: np.ndarray) -> np.ndarray:
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scales)
    # To the nearest, ties away from zero, as C's roundf.
    codes = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)
    return _joined(scales, codes.astype(np.int8).view(np.uint8))


def _codes_of_4(blocks: np.ndarray) -> np.ndarray:
    """The value of largest magnitude becomes code 0, which stands for -8."""
    largest = np.abs(blocks).argmax(axis=1, keepdims=True)
    scales = np.take_along_axis(blocks, largest, axis=1) / np.float32(-8)
    codes = np.trunc(blocks * _inverse(scales) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    first, second = codes[:, : BLOCK // 2], codes[:, BLOCK // 2 :]
    return _joined(scales, first | (second << np.uint8(4)))


def _inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scale; 0 where that is no number, for a block of zeros or of denormals, whose scale is 0
    as float16."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _joined(scales: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.concatenate([scales.astype(np.float16).view(np.uint8), codes], axis=1)


_CODES: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {8: _codes_of_8, 4: _codes_of_4}
