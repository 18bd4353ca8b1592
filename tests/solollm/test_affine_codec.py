"""Affine quantisation: the bits of `mx.quantize`, for every width of code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solollm.affine_codec import BITS, Quantized, dequantize, quantize


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of unlike size, with the cases that a formula gets wrong: a row of zeros, one sign
    only, halves between two codes, one value alone."""
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    values *= np.logspace(-6, 4, rows, dtype=np.float32)[:, None]
    values[0] = 0
    values[1] = np.abs(values[1])
    values[2] = -np.abs(values[2])
    values[3] = np.arange(columns) / 2
    values[4] = 1.5
    return values


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_bits_equal_mlx(bits: int, group_size: int) -> None:
    """A code that differs by one is another model than the one that mlx-lm would have made."""
    mx = pytest.importorskip("mlx.core")
    values = matrix(40, 256)
    ours = quantize(values, bits=bits, group_size=group_size)
    with mx.stream(mx.cpu):
        theirs = mx.quantize(mx.array(values), group_size=group_size, bits=bits)
        back = mx.dequantize(*theirs, group_size=group_size, bits=bits)
        mx.eval(theirs, back)
    for name, mine, other in zip(Quantized._fields, ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, np.array(other), err_msg=name)
    np.testing.assert_array_equal(dequantize(ours, bits=bits), np.array(back))


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_equal_mlx_from_narrow_weights(bits: int) -> None:
    """mlx-lm rounds weights to the model's dtype first; the scales are then stored in it."""
    mx = pytest.importorskip("mlx.core")
    values = mx.array(matrix(40, 128)).astype(mx.bfloat16)
    ours = quantize(np.array(values.astype(mx.float32)), bits=bits, group_size=64)
    with mx.stream(mx.cpu):
        codes, scales, biases = mx.quantize(values, group_size=64, bits=bits)
        mx.eval(codes, scales, biases)
    np.testing.assert_array_equal(ours.codes, np.array(codes))
    for mine, other in ((ours.scales, scales), (ours.biases, biases)):
        narrow = mx.array(mine).astype(mx.bfloat16)
        np.testing.assert_array_equal(np.array(narrow.view(mx.uint16)), other.view(mx.uint16))


@settings(max_examples=50, deadline=None)
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 99), rows=st.integers(5, 9))
def test_values_come_back_within_half_a_step(bits: int, seed: int, rows: int) -> None:
    """A shift in packing loses whole values, not halves of a step. The bound farther from zero is
    kept exactly; the scale bends by at most half a step over all codes, so the other bound may be
    off by one step."""
    values = matrix(rows, 64, seed)
    quantized = quantize(values, bits=bits, group_size=64)
    error = np.abs(dequantize(quantized, bits=bits) - values)
    span = values.max(-1) - values.min(-1)
    assert (error.max(-1) <= np.maximum(span / (2**bits - 1), 1e-7) * 1.001).all()


def test_blocks_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices go through in blocks of rows; a border must leave no trace."""
    values = matrix(40, 256)
    whole = quantize(values, bits=4, group_size=64)
    monkeypatch.setattr("solollm.affine_codec._BLOCK_ELEMENTS", 3 * 256)
    for mine, other in zip(quantize(values, bits=4, group_size=64), whole, strict=True):
        np.testing.assert_array_equal(mine, other)
    np.testing.assert_array_equal(dequantize(whole, bits=4), _unblocked(whole))


def _unblocked(matrix: Quantized) -> np.ndarray:
    codes = matrix.codes.view(np.uint8)[..., None] >> np.array([0, 4], np.uint8) & 15
    groups = codes.reshape(*matrix.scales.shape, 64).astype(np.float32)
    values = groups * matrix.scales[..., None] + matrix.biases[..., None]
    return values.reshape(len(matrix.scales), -1)
