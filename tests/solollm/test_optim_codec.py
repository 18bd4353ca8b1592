"""The 8-bit codec and the counter-based bits, against independent formulas and statistics."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from solollm.optim_codec import (
    BLOCK_SIZE,
    Quantized,
    State,
    codebook,
    counter_bits,
    counter_uniform,
    dequantize,
    is_quantized,
    num_blocks,
    quantize,
    round_stochastically,
    search_table,
    state_dtype,
)

STATES: tuple[State, ...] = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def test_bits_are_frozen() -> None:
    """A changed constant or key would change every dropout mask and rounding of old runs."""
    assert counter_bits(0, 0, "a", 4).tolist() == [555027270, 3241573058, 2601063114, 4015143173]
    assert counter_bits(7, 3, "model.norm.weight", 2, offset=2**32 - 1).dtype == np.uint32


def test_bits_of_a_slice_are_the_slice_of_the_bits() -> None:
    """A sharded rank must draw the bits of its own elements, not of the first ones."""
    whole = counter_bits(1, 2, "x", 1000)
    np.testing.assert_array_equal(counter_bits(1, 2, "x", 300, offset=400), whole[400:700])


def test_index_wraps_at_32_bits() -> None:
    """Element 2^32 must not overflow into an error or another dtype."""
    assert counter_bits(1, 2, "x", 2, offset=2**32 - 1)[1] == counter_bits(1, 2, "x", 1)[0]


def test_uniform_bits_pass_statistics() -> None:
    """A weak mixer shows as biased bits, bytes, neighbours or streams. 5 sigma, fixed seeds."""
    count = 1 << 18
    bits = counter_bits(123, 45, "model.layers.0.mlp.up_proj.weight", count)
    limit = 5 * 0.5 / np.sqrt(count)
    for position in range(32):
        plane = (bits >> np.uint32(position)) & np.uint32(1)
        assert abs(plane.mean() - 0.5) < limit
        assert abs((plane[1:] ^ plane[:-1]).mean() - 0.5) < limit
    for shift in (0, 8, 16, 24):
        histogram = np.bincount((bits >> np.uint32(shift)) & np.uint32(255), minlength=256)
        chi_square = ((histogram - count / 256) ** 2 / (count / 256)).sum()
        assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)


@pytest.mark.parametrize("other", [(124, 45, "w"), (123, 46, "w"), (123, 45, "v")])
def test_streams_are_independent(other: tuple[int, int, str]) -> None:
    """Consecutive steps with related bits would make stochastic rounding drift."""
    count = 1 << 16
    distance = counter_bits(123, 45, "w", count) ^ counter_bits(*other, count)
    for position in range(32):
        plane = (distance >> np.uint32(position)) & np.uint32(1)
        assert abs(plane.mean() - 0.5) < 5 * 0.5 / np.sqrt(count)


def test_uniform_is_below_one_and_even() -> None:
    """A value of 1.0 would round up twice; a wrong scale would bias every sample."""
    values = counter_uniform(0, 0, "u", 1 << 18)
    assert values.dtype == np.float32
    assert values.min() >= 0.0
    assert values.max() < 1.0
    ordered = np.sort(values)
    gap = np.abs(ordered - np.arange(len(values)) / len(values)).max()
    assert gap < 1.95 / np.sqrt(len(values))  # Kolmogorov-Smirnov at p = 0.001


def dynamic_map() -> np.ndarray:
    """The signed table of Dettmers et al. 2022, as in bitsandbytes: the comparison."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)
        levels += [*means, *-means]
    return np.sort(levels)


def test_square_law_beats_the_dynamic_map() -> None:
    """The reason for our own table must stay true: a smaller error on moments, whose elements are
    sums of many heavy-tailed gradients."""
    gradients = np.random.default_rng(5).standard_t(4, (30, 256, 256))
    weights = 0.1 * 0.9 ** np.arange(30)[::-1, None, None]
    moment = (weights * gradients).sum(0).astype(np.float32)
    ours = dequantize(quantize(moment, "exp_avg"), "exp_avg")
    absmax, table = np.abs(moment).max(axis=1, keepdims=True), dynamic_map()
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, moment / absmax)
    theirs = table[codes] * absmax
    assert np.square(ours - moment).sum() < 0.5 * np.square(theirs - moment).sum()


def test_codebooks_are_frozen() -> None:
    """Codes on disk mean nothing without these exact tables."""
    digests = []
    for state in ("exp_avg", "exp_avg_sq"):
        book = codebook(state)
        content = book.levels.tobytes() + book.borders.tobytes()
        digests.append(hashlib.blake2b(content, digest_size=8).hexdigest())
    assert digests == ["152fb8af95ba068f", "a3146019f363a2ca"]


@pytest.mark.parametrize("state", STATES)
def test_codes_are_the_nearest_levels(state: State) -> None:
    """An off-by-one in the borders doubles the error and biases the moments."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((40, 130)).astype(np.float32)
    if state == "exp_avg_sq":
        values = values**2
    codes, absmax = quantize(values, state)
    levels = codebook(state).levels.astype(np.float64)
    scaled = values.reshape(-1) / np.repeat(absmax, BLOCK_SIZE)[: values.size]
    if state == "exp_avg_sq":  # nearest in the root
        scaled, levels = np.sqrt(scaled), np.sqrt(levels)
    best = np.abs(scaled[:, None] - levels).min(axis=1)
    chosen = np.abs(scaled - levels[codes.reshape(-1)])
    np.testing.assert_allclose(chosen, best, atol=1e-7)
    assert codes.shape == values.shape
    assert absmax.shape == (num_blocks(values.shape),)


@pytest.mark.parametrize("state", STATES)
def test_second_round_trip_changes_nothing(state: State) -> None:
    """export -> import -> export must be bit-equal also for a backend that decodes in between."""
    values = np.random.default_rng(1).standard_normal((17, 300)).astype(np.float32)
    if state == "exp_avg_sq":
        values = values**2
    first = quantize(values, state)
    second = quantize(dequantize(first, state), state)
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_allclose(first.absmax, second.absmax, rtol=1e-6)


def test_second_moment_never_collapses() -> None:
    """A variance rounded to zero beside a live first moment makes Adam's step explode."""
    values = np.full((1, 256), 1e-30, np.float32)
    values[0, 0] = 1.0
    restored = dequantize(quantize(values, "exp_avg_sq"), "exp_avg_sq")
    assert (restored > 0).all()


@pytest.mark.parametrize("state", STATES)
def test_zeros_stay_zero(state: State) -> None:
    """A block without gradient divides zero by zero."""
    zeros = np.zeros((3, 100), np.float32)
    quantized = quantize(zeros, state)
    assert (quantized.absmax == 0).all()
    np.testing.assert_array_equal(dequantize(quantized, state), zeros)


def test_relative_error_of_a_variance_is_bounded() -> None:
    """The bound training rests on: roots over two decades of a block are within 4%."""
    values = np.geomspace(0.01, 1, 256, dtype=np.float32)[None] ** 2
    restored = dequantize(quantize(values, "exp_avg_sq"), "exp_avg_sq")
    assert np.abs(np.sqrt(restored / values) - 1).max() < 0.04


@pytest.mark.parametrize("state", STATES)
def test_search_table_finds_every_code(state: State) -> None:
    """Backends look codes up; one border too many in a bucket would give other codes than the
    reference, and states that differ after a move."""
    borders = codebook(state).borders
    around = [borders, np.nextafter(borders, np.float32(-2)), np.nextafter(borders, np.float32(2))]
    random = np.random.default_rng(3).uniform(-1, 1, 200_000).astype(np.float32)
    x = np.concatenate([*around, random, random**9, np.array([0, -0.0, 1, -1, 1e-45, -1e-45])])
    x = x.astype(np.float32)
    x = np.abs(x) if state == "exp_avg_sq" else x
    low = search_table(state)[x.view(np.uint32) >> np.uint32(16)]
    codes = low + (x > np.append(borders, np.float32(np.inf))[low])
    np.testing.assert_array_equal(codes, np.searchsorted(borders, x, side="left"))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=2, max_side=400),
        elements=st.floats(-(2.0**50), 2.0**50, width=32, allow_subnormal=True),
    )
)
def test_any_finite_tensor_survives(values: np.ndarray) -> None:
    """Short last blocks, subnormals and huge values must give finite states, near the originals."""
    quantized = quantize(values, "momentum_buffer")
    restored = dequantize(quantized, "momentum_buffer")
    scale = np.repeat(quantized.absmax, BLOCK_SIZE)[: values.size].reshape(values.shape)
    assert np.isfinite(restored).all()
    assert (np.abs(restored - values) <= 0.008 * scale + 1e-44).all()


def test_which_parameters_are_quantised() -> None:
    """Norms, small matrices and embeddings stay fp32, or quality falls for no memory."""
    assert is_quantized((64, 64), "matrix")
    assert not is_quantized((64, 63), "matrix")
    assert not is_quantized((50_000, 64), "other")


def test_absmax_follows_the_flat_order() -> None:
    """Blocks run along the flattened tensor, not along rows."""
    values = np.zeros((3, 200), np.float32)
    values[1, 56] = 2.0  # flat 256: the first element of the second block
    np.testing.assert_array_equal(quantize(values, "exp_avg").absmax, [0, 2, 0])
    assert isinstance(quantize(values, "exp_avg"), Quantized)


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be() -> None:
    """A rounding that leans one way moves every weight that way at every step."""
    values = np.array([1.0, -2.5, 0.0, 1.001, -1.001, 3e-39, 1e30], np.float32)
    exact = [0, 1, 2]
    drawn = np.stack(
        [round_stochastically(values, counter_bits(0, step, "w", 7)) for step in range(4000)]
    )
    widened = (drawn.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    np.testing.assert_array_equal(widened[:, exact], np.tile(values[exact], (4000, 1)))
    step = np.abs(values) * 2.0**-7  # of bfloat16, at most
    assert (np.abs(widened - values) <= np.maximum(step, 2.0**-133)).all()
    error = np.abs(widened.mean(axis=0) - values)
    assert (error <= 4 * np.maximum(step, 2.0**-133) / np.sqrt(4000)).all()


@pytest.mark.parametrize(("bits", "expected"), [(32, "F32"), (16, "BF16"), (8, "U8")])
def test_state_dtype_follows_the_bits_where_they_pay(bits: int, expected: str) -> None:
    """Norms stay fp32 in every width, the embedding in 8 bits."""
    assert state_dtype((64, 64), "matrix", bits) == expected
    assert state_dtype((64,), "other", bits) == "F32"
    assert state_dtype((1000, 64), "other", bits) == ("BF16" if bits == 16 else "F32")
