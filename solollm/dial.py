"""The dials: a preset name or a depth gives the model, and from it batch, learning rate, horizon.

Plain formulas, so that a user can predict them; every value can be overridden in the run's config.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from solollm.architecture import ModelConfig
from solollm.errors import ConfigError, nearest

# hidden, layers, heads, kv heads, intermediate, context, tied head.
_PRESETS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "15m": (288, 6, 6, 6, 768, 1024, True),
    "125m": (768, 12, 12, 12, 2048, 2048, True),
    "350m": (1024, 24, 16, 16, 2736, 2048, True),
    "1.3b": (2048, 24, 16, 16, 5504, 2048, False),
    "2.7b": (2560, 32, 20, 20, 6912, 2048, False),
    "7b": (4096, 32, 32, 32, 11008, 4096, False),
}
PRESET_NAMES = tuple(_PRESETS)
# Compute-optimal for this layout under Muon, as nanochat measured it and takes it (its
# `target-param-data-ratio`); AdamW wants about twice as many: Hoffmann et al. 2022, 2203.15556.
TOKENS_PER_PARAMETER = 10.5


class Horizon(NamedTuple):
    """What the dial recommends for a model: tokens per step, learning rate, tokens in all."""

    tokens_per_step: int
    lr: float
    total_tokens: int


def preset(name: str, vocab_size: int) -> ModelConfig:
    """The model of a preset. Raises ConfigError for an unknown name."""
    row = _PRESETS.get(name.lower())
    if row is None:
        raise ConfigError(
            f"unknown preset {name!r}",
            why=f"the presets are {', '.join(_PRESETS)}",
            fix=nearest(name.lower(), _PRESETS),
        )
    hidden, layers, heads, kv_heads, inter, context, tied = row
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=inter,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=hidden // heads, max_position_embeddings=context, tie_word_embeddings=tied,
    )  # fmt: skip


def from_depth(depth: int, vocab_size: int) -> ModelConfig:
    """The model of `--depth`: width grows a little faster than depth, up to 64 per layer.

    hidden = depth * min(64, 24 + 2 * depth), rounded up to 32 below 128 and to 64 from there;
    head size 32, 64 or 128; SwiGLU 8/3 rounded to 32; the head is tied below 16 layers.
    """
    if not 1 <= depth <= 64:
        raise ConfigError(f"depth {depth} is outside 1 to 64", fix="give --depth between them")
    width = depth * min(64, 24 + 2 * depth)
    unit = 32 if width < 128 else 64
    hidden = max(unit, -(-width // unit) * unit)
    head_dim = 32 if hidden < 128 else 64
    if hidden >= 2048 and hidden % 128 == 0:
        head_dim = 128
    heads = hidden // head_dim
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden,
        intermediate_size=-(-8 * hidden // 3 // 32) * 32,
        num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=heads,
        head_dim=head_dim, max_position_embeddings=min(2048, max(256, 64 * depth)),
        tie_word_embeddings=depth < 16,
    )  # fmt: skip


def horizon(model: ModelConfig) -> Horizon:
    """Batch, peak learning rate and tokens for a model trained once, compute-optimally.

    Tokens: 10.5 per parameter that multiplies. Batch: 2,048 tokens at one million parameters,
    growing with the square root of the size, to the nearest power of two. Learning rate: 6e-3 at a
    width of 128, falling with the square root of the width.
    """
    parameters = model.num_matrix_parameters()
    exponent = round(math.log2(2048 * (parameters / 1e6) ** 0.5))
    lr = 6e-3 * (128 / model.hidden_size) ** 0.5
    total = round(TOKENS_PER_PARAMETER * parameters)
    return Horizon(2 ** min(19, max(10, exponent)), round(lr, 6), total)
