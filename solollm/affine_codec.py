"""Affine quantisation of matrices in groups, bit for bit as MLX does it.

A group of neighbours in a row shares a scale and a bias: `value = code * scale + bias`, codes of
2 to 8 bits. The formula is that of `mx.quantize` (mode "affine"); that the bits are equal is
tested. Where it is used: `solollm.export` writes such matrices, `solollm.importing` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BITS = (2, 3, 4, 5, 6, 8)
_BLOCK_ELEMENTS = 1 << 20  # bounds the working memory
_SMALLEST_SCALE = np.float32(1e-7)


class Quantized(NamedTuple):
    """A matrix [rows, columns] in codes.

    Attributes:
        codes: uint32 [rows, columns * bits / 32]; a row is one little-endian stream of bits.
        scales, biases: float32 [rows, columns / group_size].
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


def quantize(values: np.ndarray, *, bits: int, group_size: int) -> Quantized:
    """Quantise a float32 matrix whose rows divide into groups."""
    rows, columns = values.shape
    assert bits in BITS, bits
    assert columns % group_size == 0, (columns, group_size)
    result = Quantized(
        np.empty((rows, columns * bits // 32), np.uint32),
        np.empty((rows, columns // group_size), np.float32),
        np.empty((rows, columns // group_size), np.float32),
    )
    for block in _blocks(rows, columns):
        groups = values[block].reshape(-1, columns // group_size, group_size)
        scales, biases = _scales(groups.min(-1), groups.max(-1), np.float32(2**bits - 1))
        codes = np.rint((groups - biases[..., None]) / scales[..., None])
        codes = np.clip(codes, 0, 2**bits - 1).astype(np.uint64)
        result.codes[block] = _pack(codes, bits).reshape(len(groups), -1)
        result.scales[block], result.biases[block] = scales, biases
    return result


def dequantize(matrix: Quantized, *, bits: int) -> np.ndarray:
    """The float32 values [rows, columns] that the codes stand for."""
    rows, num_groups = matrix.scales.shape
    columns = matrix.codes.shape[1] * 32 // bits
    values = np.empty((rows, columns), np.float32)
    for block in _blocks(rows, columns):
        codes = _unpack(matrix.codes[block], bits).reshape(-1, num_groups, columns // num_groups)
        scales, biases = matrix.scales[block], matrix.biases[block]
        groups = codes.astype(np.float32) * scales[..., None] + biases[..., None]
        values[block] = groups.reshape(-1, columns)
    return values


def _scales(
    low: np.ndarray, high: np.ndarray, num_steps: np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of groups with these bounds. The bound farther from zero becomes the bias,
    and the scale is bent so that zero, if the group holds it, is one of the codes."""
    low_is_farther = np.abs(low) > np.abs(high)
    scales = np.maximum((high - low) / num_steps, _SMALLEST_SCALE)
    scales = np.where(low_is_farther, scales, -scales)
    edge = np.where(low_is_farther, low, high)
    zero_code = np.rint(edge / scales)
    has_zero = zero_code != 0
    scales = np.where(has_zero, edge / np.where(has_zero, zero_code, np.float32(1)), scales)
    return scales, np.where(has_zero, edge, np.float32(0))


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint64 codes to uint32 words: eight codes are `bits` bytes."""
    eights = codes.reshape(-1, 8)
    words = np.zeros(len(eights), "<u8")
    for place in range(8):
        words |= eights[:, place] << np.uint64(place * bits)
    octets = words.view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(octets).reshape(-1).view("<u4")


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The other way: uint32 words to uint64 codes."""
    octets = np.ascontiguousarray(words).reshape(-1).view(np.uint8).reshape(-1, bits)
    eights = np.zeros((len(octets), 8), np.uint8)
    eights[:, :bits] = octets
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    codes: np.ndarray = (eights.view("<u8") >> shifts) & np.uint64(2**bits - 1)
    return codes


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // columns)
    return (slice(start, start + step) for start in range(0, rows, step))
