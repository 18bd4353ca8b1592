"""The exponential of processors and what is made of it, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
import mlx.core as mx
from solollm_mlx.exponential import MASKED, exp_of_negative, log_sum_exp, softmax, swiglu

RNG = np.random.default_rng(0)


def test_exponential_is_right_to_a_unit_in_the_last_place() -> None:
    """Guards the polynomial, the rounding of its exponent, and both ends of its range."""
    x = np.concatenate([-RNG.random(20000) * 87, [0.0, -0.0, -1e-8, 1e-6, -87.3]]).astype("f4")
    np.testing.assert_allclose(
        np.array(exp_of_negative(mx.array(x))), np.exp(x.astype("f8")), rtol=1.2e-7
    )
    far = np.array(exp_of_negative(mx.array([-89.0, -1e4, MASKED, np.nan])))
    np.testing.assert_array_equal(far, [0, 0, 0, np.nan])


def test_log_sum_exp_and_softmax() -> None:
    """Guards large scores, masked ones and a row of a single one."""
    x = (RNG.standard_normal((7, 50)) * 20 + 300).astype("f4")
    x[2, 1:] = MASKED
    exact = np.exp((x - x.max(1, keepdims=True)).astype("f8"))
    np.testing.assert_allclose(
        np.array(log_sum_exp(mx.array(x))), np.log(exact.sum(1)) + x.max(1), rtol=1e-6
    )
    expected = exact / exact.sum(1, keepdims=True)
    np.testing.assert_allclose(np.array(softmax(mx.array(x))), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("own", "plain"),
    [
        (lambda x, y: softmax(x) * y, lambda x, y: mx.softmax(x, axis=-1) * y),
        (swiglu, lambda x, y: x * mx.sigmoid(x) * y),
    ],
    ids=["softmax", "swiglu"],
)
def test_gradients_are_those_of_mlx(own: Callable[..., Any], plain: Callable[..., Any]) -> None:
    """Guards the gradients written by hand."""
    x, y, weights = (mx.array(RNG.standard_normal((5, 33)).astype("f4") * 4) for _ in range(3))
    results = [
        mx.value_and_grad(lambda x, y, f=f: (f(x, y) * weights).sum(), argnums=(0, 1))(x, y)
        for f in (own, plain)
    ]
    np.testing.assert_allclose(np.array(results[0][0]), np.array(results[1][0]), rtol=1e-5)
    for actual, expected in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(np.array(actual), np.array(expected), rtol=1e-5, atol=1e-5)


def test_narrow_dtypes_keep_theirs() -> None:
    """Guards bf16 and fp16 against a silent widening, which would double what is kept."""
    x = mx.array([[-1.0, 2.0, 0.5]], mx.bfloat16)
    assert {softmax(x).dtype, swiglu(x, x).dtype, exp_of_negative(-mx.abs(x)).dtype} == {
        mx.bfloat16
    }
