"""The 8-bit optimizer-state codec of `solollm.optim_codec` in MLX, equal to it bit for bit."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from solollm.optim_codec import BLOCK_SIZE, State, codebook, num_blocks, search_table


class _Tables(NamedTuple):
    levels: mx.array  # float32 [256]
    borders: mx.array  # float32 [256], the last one infinite
    low: mx.array  # int32 [65536], see `search_table`


@cache
def _tables(state: State) -> _Tables:
    # Arrays made from NumPy are evaluated: any thread may use them, and a trace holds one copy.
    book = codebook(state)
    borders = np.append(book.borders, np.float32(np.inf))
    return _Tables(mx.array(book.levels), mx.array(borders), mx.array(search_table(state)))


def quantize(values: mx.array, state: State) -> tuple[mx.array, mx.array]:
    """(uint8 codes in the shape of float32 `values`, float32 absmax [num_blocks])."""
    tables, blocks = _tables(state), num_blocks(values.shape)
    padded = mx.pad(values.reshape(-1), (0, blocks * BLOCK_SIZE - values.size))
    padded = padded.reshape(blocks, BLOCK_SIZE)
    absmax = mx.abs(padded).max(axis=1)
    scaled = padded / mx.where(absmax > 0, absmax, 1.0)[:, None]
    low = tables.low[mx.right_shift(scaled.view(mx.uint32), 16)]
    codes = low + (scaled > tables.borders[low]).astype(mx.int32)
    return codes.astype(mx.uint8).reshape(-1)[: values.size].reshape(values.shape), absmax


def dequantize(codes: mx.array, absmax: mx.array, state: State) -> mx.array:
    """float32 in the shape of `codes`: level times absmax."""
    scale = mx.repeat(absmax, BLOCK_SIZE)[: codes.size].reshape(codes.shape)
    return _tables(state).levels[codes] * scale
