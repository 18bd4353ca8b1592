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

import mlx.core as mx

from solollm.architecture import ModelConfig
from solollm_mlx.attention import attend
from solollm_mlx.exponential import swiglu

Weights = dict[str, mx.array]


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


def block(
    weights: Weights,
    x: mx.array,
    frequencies: mx.array,
    segments: mx.array | None,
    *,
    config: ModelConfig,
) -> mx.array:
    """One layer over its own weights (names without the layer's prefix): [B, T, C] to the same."""
    rows, length, _ = x.shape
    dim = config.head_dim
    normed = rms_norm(x, weights["input_layernorm.weight"], config)  # [B, T, C]

    def heads(name: str, norm: str | None) -> mx.array:
        y = linear(normed, weights[f"self_attn.{name}_proj.weight"])  # [B, T, heads * D]
        y = y.reshape(rows, length, -1, dim)  # [B, T, heads, D]
        if norm is not None and config.qk_norm:
            y = rms_norm(y, weights[f"self_attn.{norm}.weight"], config)
        return y.transpose(0, 2, 1, 3)  # [B, heads, T, D]

    q, k, v = heads("q", "q_norm"), heads("k", "k_norm"), heads("v", None)
    q, k = rotate(q, frequencies), rotate(k, frequencies)
    attended = attend(q, k, v, segments)  # [B, H, T, D]
    attended = attended.transpose(0, 2, 1, 3).reshape(rows, length, -1)  # [B, T, H * D]
    x = x + linear(attended, weights["self_attn.o_proj.weight"])  # [B, T, C]
    normed = rms_norm(x, weights["post_attention_layernorm.weight"], config)
    gate = linear(normed, weights["mlp.gate_proj.weight"])  # [B, T, F]
    up = linear(normed, weights["mlp.up_proj.weight"])  # [B, T, F]
    return x + linear(swiglu(gate, up), weights["mlp.down_proj.weight"])  # [B, T, C]


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
) -> mx.array:
    """int [B, T] to normalised hidden states [B, T, C]; `segments` int [B, T], None: causal."""
    frequencies = rotary_frequencies(config)
    x = weights["model.embed_tokens.weight"][input_ids].astype(dtype)  # [B, T, C]

    def layer(own: Weights, stream: mx.array) -> mx.array:
        # Integer arrays are closed over: mx.checkpoint cannot differentiate past them as arguments.
        return block(own, stream, frequencies, segments, config=config)

    run = mx.checkpoint(layer) if checkpointing else layer
    for index in range(config.num_hidden_layers):
        x = run(layer_weights(weights, index), x)
    return rms_norm(x, weights["model.norm.weight"], config)


def head_weight(weights: Weights) -> mx.array:
    """[V, C]: logits are `hidden @ head_weight.T`; the embedding where the head is tied."""
    return weights.get("lm_head.weight", weights["model.embed_tokens.weight"])


def logits(
    weights: Weights, input_ids: mx.array, segments: mx.array | None, *, config: ModelConfig,
    dtype: mx.Dtype = mx.float32,
) -> mx.array:  # fmt: skip
    """All logits [B, T, V]: for tests and small inputs; training never holds them."""
    hidden = hidden_states(weights, input_ids, segments, config=config, dtype=dtype)
    return linear(hidden, head_weight(weights))
