"""Frozen weights in 4 bits: MLX's affine codes in groups of 64, on every device that MLX has.

A group of neighbours in a row shares a scale and a bias (`value = code * scale + bias`), which are
kept in the compute dtype: 4.5 bits per weight in bf16, 5 in fp32. The names are mlx-lm's: the codes
stand where the matrix would (`<matrix>.weight`, uint32), `<matrix>.scales` and `<matrix>.biases`
beside them. The same codes in NumPy, for an export where no MLX is: `solollm.affine_codec`. What is
computed with such weights is in `adapter`.

Shapes: O rows and I columns of a matrix, N positions.
"""

from __future__ import annotations

import mlx.core as mx

GROUP_SIZE, BITS = 64, 4


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a matrix can be held in codes: its rows divide into groups."""
    return shape[-1] % GROUP_SIZE == 0


def encode(name: str, weight: mx.array, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The three arrays of the matrix `name` [O, I], evaluated. The codes are those of its fp32
    values, so that they do not depend on `dtype`, what it is computed in."""
    codes, scales, biases = mx.quantize(weight.astype(mx.float32), group_size=GROUP_SIZE, bits=BITS)
    coded = {
        f"{name}.weight": codes,
        f"{name}.scales": scales.astype(dtype),
        f"{name}.biases": biases.astype(dtype),
    }
    mx.eval(coded)
    return coded


def quantized_linear(x: mx.array, matrix: tuple[mx.array, mx.array, mx.array]) -> mx.array:
    """x [..., I] times the matrix (codes, scales, biases) transposed: [..., O]."""
    return mx.quantized_matmul(x, *matrix, transpose=True, group_size=GROUP_SIZE, bits=BITS)
