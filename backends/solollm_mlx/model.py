"""The decoder in MLX: a function of its weights.

The same Llama as `solollm_torch/model.py`, in MLX's idiom: weights are a plain dict from canonical
Hugging Face name to array (fp32 masters; every operation casts its weight to the dtype of its
input, so compute in bf16 costs no second copy), and the model is a pure function that
`mx.value_and_grad` and `mx.compile` take whole. Attention within documents is in `attention`, the
loss in `loss`, decoding in `engine`.

Shapes: B rows, T positions, C hidden size, H query heads, K key/value heads, D head size,
F intermediate size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from solollm.architecture import ModelConfig
from solollm_mlx.attention import attend
from solollm_mlx.exponential import swiglu

Weights = dict[str, mx.array]
# (weights, "self_attn.q_proj" or another matrix of theirs, x [..., in]) -> [..., out]
Projection = Callable[[Weights, str, mx.array], mx.array]


def rotary_frequencies(config: ModelConfig) -> mx.array:
    """float32 [D/2]: what `mx.fast.rope` divides a position by (the inverse of the frequency).

    RoPE, Su et al. 2021, arXiv:2104.09864, half-split as in HF Llama; Llama 3's scaling slows the
    low frequencies down by `factor` and blends in between.
    """
    exponent = mx.arange(0, config.head_dim, 2, dtype=mx.float32) / config.head_dim
    frequency = 1.0 / mx.power(mx.array(config.rope_theta, mx.float32), exponent)  # [D/2]
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = mx.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    return 1.0 / frequency


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """x [..., in] times weight [out, in] transposed: [..., out]."""
    return x @ weight.astype(x.dtype).T


def project(weights: Weights, name: str, x: mx.array) -> mx.array:
    """x [..., in] through the matrix of that name: [..., out]."""
    return linear(x, weights[f"{name}.weight"])


def block(
    weights: Weights,
    x: mx.array,
    frequencies: mx.array,
    segments: mx.array | None,
    *,
    config: ModelConfig,
    project: Projection = project,
) -> mx.array:
    """One layer over its own weights (names without the layer's prefix): [B, T, C] to the same."""
    rows, length, _ = x.shape
    dim = config.head_dim
    normed = rms_norm(x, weights["input_layernorm.weight"], config)  # [B, T, C]

    def heads(name: str, norm: str | None) -> mx.array:
        y = project(weights, f"self_attn.{name}_proj", normed)  # [B, T, heads * D]
        y = y.reshape(rows, length, -1, dim)  # [B, T, heads, D]
        if norm is not None and config.qk_norm:
            y = rms_norm(y, weights[f"self_attn.{norm}.weight"], config)
        return y.transpose(0, 2, 1, 3)  # [B, heads, T, D]

    q, k, v = heads("q", "q_norm"), heads("k", "k_norm"), heads("v", None)
    q, k = rotate(q, frequencies), rotate(k, frequencies)
    attended = attend(q, k, v, segments)  # [B, H, T, D]
    attended = attended.transpose(0, 2, 1, 3).reshape(rows, length, -1)  # [B, T, H * D]
    x = x + project(weights, "self_attn.o_proj", attended)  # [B, T, C]
    normed = rms_norm(x, weights["post_attention_layernorm.weight"], config)
    gate = project(weights, "mlp.gate_proj", normed)  # [B, T, F]
    up = project(weights, "mlp.up_proj", normed)  # [B, T, F]
    return x + project(weights, "mlp.down_proj", swiglu(gate, up))  # [B, T, C]


def rms_norm(x: mx.array, weight: mx.array, config: ModelConfig) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019)."""
    return mx.fast.rms_norm(x, weight.astype(x.dtype), config.rms_norm_eps)


def rotate(x: mx.array, frequencies: mx.array) -> mx.array:
    """Rotate the halves of every head of x [B, heads, T, D] by its position."""
    return mx.fast.rope(
        x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=0, freqs=frequencies
    )


def layer_weights(weights: Weights, layer: int) -> Weights:
    """The weights of one layer, without their prefix."""
    prefix = f"model.layers.{layer}."
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def hidden_states(
    weights: Weights,
    input_ids: mx.array,
    segments: mx.array | None,
    *,
    config: ModelConfig,
    dtype: mx.Dtype,
    checkpointing: bool = False,
    project: Projection = project,
) -> mx.array:
    """int [B, T] to normalised hidden states [B, T, C]; `segments` int [B, T], None: causal.
    `project`: how a block's matrices are applied, where they are not plain."""
    frequencies = rotary_frequencies(config)
    x = weights["model.embed_tokens.weight"][input_ids].astype(dtype)  # [B, T, C]

    # Integers (segments, codes of a quantised matrix) are bound and no arguments: mx.checkpoint
    # asks for a gradient by every argument, and they have none.
    def layer(codes: Weights, own: Weights, stream: mx.array) -> mx.array:
        whole = codes | own
        return block(whole, stream, frequencies, segments, config=config, project=project)

    for index in range(config.num_hidden_layers):
        own = layer_weights(weights, index)
        codes = {name: own.pop(name) for name in list(own) if own[name].dtype == mx.uint32}
        run = partial(layer, codes)
        x = (mx.checkpoint(run) if checkpointing else run)(own, x)
    return rms_norm(x, weights["model.norm.weight"], config)


def head_weight(weights: Weights) -> mx.array:
    """[V, C]: logits are `hidden @ head_weight.T`; the embedding where the head is tied."""
    return weights.get("lm_head.weight", weights["model.embed_tokens.weight"])


def logits(
    weights: Weights, input_ids: mx.array, segments: mx.array | None, *, config: ModelConfig,
    dtype: mx.Dtype = mx.float32, project: Projection = project,
) -> mx.array:  # fmt: skip
    """All logits [B, T, V]: for tests and small inputs; training never holds them."""
    hidden = hidden_states(
        weights, input_ids, segments, config=config, dtype=dtype, project=project
    )
    return linear(hidden, head_weight(weights))
