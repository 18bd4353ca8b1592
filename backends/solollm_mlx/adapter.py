"""Low-rank adapters over the decoder's weights, as another way to apply a block's matrices.

The decoder takes a flat dict of arrays and a `Projection`. With an adapter the dict holds the
frozen base (in codes where it is quantised, see `quant`) and, beside each adapted matrix
`<matrix>.weight`, the factors `<matrix>.lora_A.weight` and `<matrix>.lora_B.weight`: PEFT's names
(`solollm.adapters`) without their prefix. Only the factors are differentiated, so that no gradient
of a base matrix is ever made.

Shapes: r rank, A [r, in], B [out, r] beside a weight [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from solollm.adapters import PEFT_PREFIX, AdapterOptions, adapter_pairs
from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import TensorSource
from solollm.errors import ConfigError
from solollm_mlx import quant
from solollm_mlx.mlx_lm_adapter import Lora
from solollm_mlx.model import Weights, linear
from solollm_mlx.state import read_each


def adapted_project(weights: Weights, name: str, x: mx.array, *, scale: float) -> mx.array:
    """x [..., in] through the matrix of that name and its factors, where it has any."""
    out = base_project(weights, name, x)  # [..., out]
    a, b = weights.get(f"{name}.lora_A.weight"), weights.get(f"{name}.lora_B.weight")
    if a is None or b is None:
        return out
    return out + scale * linear(linear(x, a), b)  # [..., in] -> [..., r] -> [..., out]


def base_project(weights: Weights, name: str, x: mx.array) -> mx.array:
    """x [..., in] through the frozen matrix alone: [..., out]."""
    codes = weights[f"{name}.weight"]
    scales = weights.get(f"{name}.scales")
    if scales is None:
        return linear(x, codes)
    return quant.quantized_linear(x, (codes, scales, weights[f"{name}.biases"]))


def beside_base(factors: Mapping[str, mx.array]) -> Weights:
    """The factors by the names that the decoder's dict has for them."""
    return {name.removeprefix(PEFT_PREFIX): array for name, array in factors.items()}


def lora_of(factors: Mapping[str, mx.array], model: ModelConfig, options: AdapterOptions) -> Lora:
    """The factors as an engine takes them, by the names of their matrices."""
    pairs = {
        pair.base.name.removesuffix(".weight"): (factors[pair.a.name], factors[pair.b.name])
        for pair in adapter_pairs(model, options)
    }
    return Lora(pairs, options.scale)


def read_base(
    source: TensorSource, model: ModelConfig, dtype: mx.Dtype, *, bits: int | None = None
) -> Weights:
    """The frozen base in `dtype`, read one tensor at a time; with `bits` the blocks' matrices in
    codes. One whose rows do not divide into groups stays as it is, as in mlx-lm.

    Raises:
        ConfigError: no matrix of this model can be quantised.
        IntegrityError: as `read_weights`.
    """
    table = parameter_table(model)
    quantised = set()
    if bits is not None:
        of_blocks = [spec for spec in table if spec.name.endswith("_proj.weight")]
        quantised = {spec.name for spec in of_blocks if quant.fits(spec.shape)}
        if not quantised:
            raise ConfigError(
                f"no matrix of this model can be held in {bits} bits",
                why=f"MLX quantises rows of a multiple of {quant.GROUP_SIZE} elements",
                fix="use --method lora",
            )
    # fp32 where codes are made from it, whatever is computed in.
    expected = {
        spec.name: (mx.float32 if spec.name in quantised else dtype, spec.shape) for spec in table
    }
    base: Weights = {}
    for name, array in read_each(source, expected, may_tie=model.tie_word_embeddings):
        if name in quantised:
            base |= quant.encode(name.removesuffix(".weight"), array, dtype)
        else:
            base[name] = array
    return base
