"""Bytes of an engine over a session's own weights while it draws answers, for the planner.

`tests/backends/mlx/test_memory_rollouts.py` compares them with peaks of real engines.
"""

from __future__ import annotations

import math

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import ComputeDType, SessionOptions

PREFILL_TOKENS = 2048  # of each prompt at once, as `engine` asks for where nobody says otherwise
CACHE_STEP = 256  # positions by which mlx-lm's cache grows


def rollout_bytes(
    model: ModelConfig,
    options: SessionOptions,
    compute_dtype: ComputeDType,
    *,
    sequences: int,
    length: int,
    on_cpu: bool,
) -> dict[str, int]:
    """See `solollm.backend.Backend.rollout_bytes`. Prompts that come together are read together;
    what that takes per token is fitted to nine measured peaks, 0.93 to 1.07 of them. A processor
    holds attention scores, a GPU's kernel does not."""
    item = 4 if compute_dtype == "float32" else 2
    places = math.ceil(length / CACHE_STEP) * CACHE_STEP
    heads = 2 * model.num_key_value_heads * model.head_dim
    read = min(length, PREFILL_TOKENS)
    per_token = item * (6 * model.hidden_size + 2 * model.intermediate_size)
    if on_cpu:
        per_token += (2 + item) * model.num_attention_heads * read
    copied = 0
    if options.adapter is None and item == 2:  # masters are fp32, an adapter's base is not
        copied = item * sum(math.prod(spec.shape) for spec in parameter_table(model))
    return {
        "engine": copied,
        "keys and values": item * model.num_hidden_layers * sequences * heads * places,
        "prompts": per_token * sequences * read,
        "logits": 3 * 4 * sequences * model.vocab_size,
    }
