"""NF4 with double quantisation in NumPy: the values that a 4-bit base on PyTorch computes with.

QLoRA, Dettmers et al. 2023, arXiv:2305.14314, as bitsandbytes does it: a block of 64 neighbours is
divided by its largest magnitude and each value becomes the nearest of 16 levels; the magnitudes,
less their mean, are stored in 8 bits in blocks of 256. An export merges an adapter into these
values, and any engine may serve them. The magnitudes become the nearest levels here and in
`solollm_torch.quant`, bit for bit; bitsandbytes' own kernels for them differ from each other (on a
CPU one in 600 goes to the second nearest).
"""

from __future__ import annotations

from functools import cache

import numpy as np

BLOCK_SIZE, MAGNITUDE_BLOCK_SIZE = 64, 256
# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_SMALLEST = np.float32(1e-38)


def decoded(weight: np.ndarray) -> np.ndarray:
    """float32 of the shape of `weight`: what its codes stand for."""
    blocks = _blocks(weight.astype(np.float32, copy=False).reshape(-1), BLOCK_SIZE)
    magnitudes = np.abs(blocks).max(axis=1)
    values = blocks * (np.float32(1) / np.maximum(magnitudes, _SMALLEST))[:, None]
    levels = LEVELS[np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, values.clip(-1, 1))]
    levels *= _decoded_magnitudes(magnitudes)[:, None]
    result: np.ndarray = levels.reshape(-1)[: weight.size].reshape(weight.shape)
    return result


def _decoded_magnitudes(magnitudes: np.ndarray) -> np.ndarray:
    mean = np.float32(magnitudes.astype(np.float64).sum() / len(magnitudes))
    blocks = _blocks(magnitudes - mean, MAGNITUDE_BLOCK_SIZE)
    largest = np.abs(blocks).max(axis=1)
    safe = np.where(largest > 0, largest, np.float32(1))
    table = dynamic_levels()
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, blocks / safe[:, None])
    values = table[codes] * largest[:, None]
    result: np.ndarray = values.reshape(-1)[: len(magnitudes)] + mean
    return result


@cache
def dynamic_levels() -> np.ndarray:
    """float32 [256], ascending: a shared exponent's worth of bits for small values, more fraction
    for large ones (Dettmers 2015, arXiv:1511.04561); bitsandbytes' table to the last bit or two."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        borders = np.linspace(0.1, 1, 2**exponent + 1, dtype=np.float32)
        means = (borders[:-1] + borders[1:]) / 2 * np.float64(10.0 ** (exponent - 6))
        levels += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(levels, np.float32))


def _blocks(values: np.ndarray, size: int) -> np.ndarray:
    """[blocks, size], the last one filled up with zeros."""
    padded = np.zeros(-(-len(values) // size) * size, np.float32)
    padded[: len(values)] = values
    return padded.reshape(-1, size)
