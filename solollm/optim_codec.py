"""The one 8-bit optimizer-state codec, the one counter-based random-bit function, and the rounding
made of it.

All are plain NumPy and all are references: a backend computes the same in its framework, and its
codes and bits must be equal to these bit for bit, so that a checkpoint means the same everywhere.
On disk a quantised state is `<state>.<name>`, U8 codes in the parameter's own shape, and
`<state>.<name>.absmax`, F32 [num_blocks].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

BLOCK_SIZE = 256
MIN_QUANTIZED_SIZE = 4096

State = Literal["exp_avg", "exp_avg_sq", "momentum_buffer"]
StateDType = Literal["F32", "BF16", "U8"]


class Codebook(NamedTuple):
    """The values of the 256 codes, ascending, float32 [256], and the borders between neighbours,
    float32 [255]: a number's code is how many borders lie below it."""

    levels: np.ndarray
    borders: np.ndarray


class Quantized(NamedTuple):
    """Codes, uint8 in the tensor's shape, and the largest magnitude of each block of 256 elements
    along the flattened tensor, float32 [num_blocks]."""

    codes: np.ndarray
    absmax: np.ndarray


@cache
def codebook(state: State) -> Codebook:
    """Power laws: fine near zero, and never coarser than 1.6% of absmax.

    Signed for `exp_avg` and `momentum_buffer`: with t = (code - 127) / 127 the level is t * |t|;
    code 255 is not used. Unsigned for `exp_avg_sq`: with t = code / 255 the level is t^4, a square
    law for its root, which is what Adam divides by; the borders lie half-way between the roots, and
    the lowest is 0 itself, so that only an exact zero becomes zero.

    Block-wise absmax is that of Dettmers et al. 2022, arXiv:2110.02861. Their dynamic map spends
    half of its codes below 1% of absmax; on the moments of real gradients its error is larger
    (`tests/solollm/test_optim_codec.py` compares the two).
    """
    signed = state != "exp_avg_sq"
    t = (np.arange(256) - 127) / 127 if signed else np.arange(256) / 255
    square = t * np.abs(t)
    border = (square[:-1] + square[1:]) / 2
    if signed:
        levels, borders = square.astype(np.float32), border.astype(np.float32)
    else:
        levels, borders = (square * square).astype(np.float32), (border * border).astype(np.float32)
        borders[0] = 0.0
    levels.flags.writeable = borders.flags.writeable = False
    return Codebook(levels, borders)


@cache
def search_table(state: State) -> np.ndarray:
    """int32 [65536]: the lowest code of a float32 whose upper 16 bits are the index.

    No two borders share their upper 16 bits, so `code = low + (x > borders[low])` (past the last
    border: never) is the same as the binary search in `quantize` and needs two look-ups.
    """
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    lowest = np.where(upper >> np.uint32(31), upper | np.uint32(0xFFFF), upper).view(np.float32)
    table = np.searchsorted(codebook(state).borders, lowest, side="left").astype(np.int32)
    table.flags.writeable = False
    return table


def is_quantized(shape: Sequence[int], group: str) -> bool:
    """Whether 8-bit training holds this parameter's states as codes: block matrices of at least
    4,096 elements.

    Norms and small matrices cost nothing in fp32. Embedding and head stay fp32 because a block
    mixes rows of common and of rare tokens, whose moments lie orders of magnitude apart.
    """
    return group == "matrix" and math.prod(shape) >= MIN_QUANTIZED_SIZE


def state_dtype(shape: Sequence[int], group: str, state_bits: int) -> StateDType:
    """How `state_bits` (32, 16 or 8) stores a parameter's states.

    16 bits are bfloat16, rounded stochastically at every update; they keep the exponent of fp32, so
    that embedding and head need no exception. What is smaller than 4,096 elements stays fp32.
    """
    if state_bits == 8 and is_quantized(shape, group):
        return "U8"
    if state_bits == 16 and math.prod(shape) >= MIN_QUANTIZED_SIZE:
        return "BF16"
    return "F32"


def num_blocks(shape: Sequence[int]) -> int:
    """Blocks of a tensor; the last may be short."""
    return -(-math.prod(shape) // BLOCK_SIZE)


def quantize(values: np.ndarray, state: State) -> Quantized:
    """Codes of a finite float32 tensor, computed in float32.

    absmax is the block's largest magnitude; code = how many borders lie below value / absmax. A
    block of zeros is divided by 1.
    """
    flat = np.asarray(values, np.float32).reshape(-1)
    blocks = np.zeros((num_blocks(values.shape), BLOCK_SIZE), np.float32)
    blocks.reshape(-1)[: flat.size] = flat
    absmax = np.abs(blocks).max(axis=1)
    scaled = blocks / np.where(absmax > 0, absmax, np.float32(1))[:, None]
    codes = np.searchsorted(codebook(state).borders, scaled.reshape(-1), side="left")
    return Quantized(codes[: flat.size].astype(np.uint8).reshape(values.shape), absmax)


def dequantize(quantized: Quantized, state: State) -> np.ndarray:
    """The float32 tensor: level times absmax."""
    codes, absmax = quantized
    scale = np.repeat(absmax, BLOCK_SIZE)[: codes.size]
    values: np.ndarray = codebook(state).levels[codes.reshape(-1)] * scale
    return values.reshape(codes.shape)


def counter_key(seed: int, step: int, name: str) -> tuple[int, int]:
    """The two 32-bit words that select one stream of `counter_bits`."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def counter_bits(seed: int, step: int, name: str, count: int, *, offset: int = 0) -> np.ndarray:
    """uint32 [count]: the random bits of elements offset, offset + 1, ... of a stream.

    bits(i) = mix(mix(i xor key0) xor key1), i modulo 2^32, with `mix` of 32-bit xor, shift and
    multiply only, so that every framework can compute it. Dropout, stochastic rounding and
    sampling take their bits here: nothing to save, the same on any device and world size. Within
    one stream no 32-bit word occurs twice, which samples of less than 2^24 values do not show.
    """
    key0, key1 = counter_key(seed, step, name)
    index = np.arange(offset, offset + count, dtype=np.uint64).astype(np.uint32)
    return _mix(_mix(index ^ np.uint32(key0)) ^ np.uint32(key1))


def counter_uniform(seed: int, step: int, name: str, count: int, *, offset: int = 0) -> np.ndarray:
    """float32 [count] in [0, 1): the upper 24 bits of `counter_bits`, exact in float32."""
    bits = counter_bits(seed, step, name, count, offset=offset)
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def round_stochastically(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits, uint16, of finite float32 values: one of the two neighbours, the nearer one
    more often, so that the mean over `bits` (uint32, of `counter_bits`) is the value itself.

    The lower 16 random bits are added to the lower 16 of the value, and a carry moves its
    magnitude up by one step of bfloat16. What bfloat16 holds exactly never moves.
    """
    raised = values.view(np.uint32) + (bits & np.uint32(0xFFFF))
    return (raised >> np.uint32(16)).astype(np.uint16)


def _mix(x: np.ndarray) -> np.ndarray:
    # lowbias32 with the constants of least measured bias: C. Wellons, hash-prospector, issue 19.
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0xD35A2D97)
    mixed: np.ndarray = x ^ (x >> np.uint32(15))
    return mixed
