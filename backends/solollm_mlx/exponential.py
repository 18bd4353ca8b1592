"""The exponential and what a decoder makes of it, fast on processors too.

MLX's wheels for Linux are built without fused multiply-add, so that its exponential calls the C
library six times per element: it took a third of a training step. On a processor, float32 goes
through the polynomial of Cephes instead (Moshier, `expf`; within one unit in the last place), whose
additions and multiplications the compiler turns into vector instructions. A GPU, and the narrow
dtypes, use MLX's own operations.

Softmax and the gated unit bring their own gradients: both are functions of what is kept anyway, and
neither keeps anything between.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; the first has few digits
_COEFFICIENTS = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3,
    4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
)  # fmt: skip
MASKED = -1e9  # a score that has no weight; far below any other, and still a number to divide


def exp_of_negative(x: mx.array) -> mx.array:
    """exp(x) for x <= 0 (a rounding above does no harm). NaN stays NaN; has no gradient."""
    if not _is_slow(x):
        return mx.exp(x)
    exponent = (x * _LOG2_E - 0.5).astype(mx.int32)  # rounded to nearest: casts cut towards zero
    whole = exponent.astype(mx.float32)
    rest = x - whole * _LN2_HIGH - whole * _LN2_LOW
    series = mx.array(_COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        series = series * rest + coefficient
    series = series * rest * rest + rest + 1.0
    # 2^exponent as the bits of a float; below the smallest normal number it is zero.
    return series * mx.left_shift(mx.maximum(exponent + 127, 0), 23).view(mx.float32)


def log_sum_exp(x: mx.array) -> mx.array:
    """log(sum(exp(x))) over the last dimension."""
    if not _is_slow(x):
        return mx.logsumexp(x, axis=-1)
    top = mx.max(x, axis=-1, keepdims=True)
    return mx.log(exp_of_negative(x - top).sum(axis=-1)) + top[..., 0]


def softmax(x: mx.array) -> mx.array:
    """Over the last dimension, summed in float32; no row may be all infinite."""
    shares: Any = _softmax(x)  # its types know no array
    result: mx.array = shares
    return result


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""
    product: Any = _swiglu(gate, up)
    result: mx.array = product
    return result


@mx.custom_function
def _softmax(x: mx.array) -> mx.array:
    if not _is_slow(x):
        return mx.softmax(x, axis=-1, precise=True)
    powers = exp_of_negative(x - mx.max(x, axis=-1, keepdims=True))
    return powers * (1.0 / powers.sum(axis=-1, keepdims=True))


@_softmax.vjp
def _softmax_vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    weighted = cotangent * output
    return weighted - output * weighted.sum(axis=-1, keepdims=True)


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * _sigmoid(gate) * up


@_swiglu.vjp
def _swiglu_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    share = _sigmoid(gate)
    scaled = gate * share  # silu(gate)
    return cotangent * up * (share + scaled * (1.0 - share)), cotangent * scaled


def _sigmoid(x: mx.array) -> mx.array:
    if not _is_slow(x):
        return mx.sigmoid(x)
    power = exp_of_negative(-mx.abs(x))
    return mx.where(x >= 0, 1.0, power) / (1.0 + power)


def _is_slow(x: mx.array) -> bool:
    """Whether MLX's own exponential of this array is slow."""
    return bool(x.dtype == mx.float32 and mx.default_device().type == mx.DeviceType.cpu)
