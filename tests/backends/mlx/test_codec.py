"""8-bit states in MLX: the bits of the core's NumPy codec."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
import mlx.core as mx
from solollm_mlx import codec

from solollm.optim_codec import State, codebook, dequantize, quantize

STATES: tuple[State, ...] = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def values_for(state: State) -> np.ndarray:
    """Every border and its neighbours, magnitudes of 15 decades, zeros, and a short last block."""
    borders = codebook(state).borders
    near = np.concatenate([borders, np.nextafter(borders, 1), np.nextafter(borders, -1), [1.0]])
    rng = np.random.default_rng(0)
    wide = rng.standard_normal(5000) * 10 ** rng.uniform(-12, 3, 5000)
    whole = np.concatenate([near, np.zeros(400), wide]).astype(np.float32)
    whole = whole[: len(whole) // 7 * 7].reshape(-1, 7)
    return np.abs(whole) if state == "exp_avg_sq" else whole


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("state", STATES)
def test_codes_equal_the_numpy_codec_bit_for_bit(state: State, compiled: bool) -> None:
    """Guards a state that another backend would decode to other moments."""
    values = values_for(state)
    expected = quantize(values, state)
    encode = mx.compile(codec.quantize) if compiled else codec.quantize
    codes, absmax = encode(mx.array(values), state)
    assert codes.dtype == mx.uint8
    np.testing.assert_array_equal(np.array(codes), expected.codes)
    np.testing.assert_array_equal(np.array(absmax), expected.absmax)
    decode = mx.compile(codec.dequantize) if compiled else codec.dequantize
    decoded = np.array(decode(codes, absmax, state))
    np.testing.assert_array_equal(decoded, dequantize(expected, state))
