"""Bytes of an engine over a session's own weights while it draws answers, for the planner.

`tests/backends/torch/test_memory_rollouts.py` compares them with tensors counted in real engines.
"""

from __future__ import annotations

import math

import torch

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import ComputeDType, SessionOptions
from solollm_torch.engine import prefill_tokens
from solollm_torch.gradients import DTYPES
from solollm_torch.kv_cache import capacity_for
from solollm_torch.masters import WEIGHT_DTYPES, Master, master_option


def rollout_bytes(
    model: ModelConfig,
    options: SessionOptions,
    compute_dtype: ComputeDType,
    *,
    sequences: int,
    length: int,
    device: torch.device,
) -> dict[str, int]:
    """See `solollm.backend.Backend.rollout_bytes`."""
    item, most = DTYPES[compute_dtype].itemsize, model.max_position_embeddings
    capacity = capacity_for(length, most)
    before = capacity_for(capacity // 2, most)
    places = capacity + before if before < capacity else capacity  # both are there while it grows
    heads = 2 * model.num_key_value_heads * model.head_dim
    per_token = item * (2 * model.hidden_size + 3 * model.intermediate_size)
    return {
        "engine": _copied_weights(model, options, DTYPES[compute_dtype]),
        "keys and values": item * model.num_hidden_layers * sequences * heads * places,
        "prompts": per_token * prefill_tokens(device),
        "logits": 2 * 4 * sequences * model.vocab_size,  # and their logarithms
    }


def _copied_weights(model: ModelConfig, options: SessionOptions, compute: torch.dtype) -> int:
    """What an engine copies because the session holds it otherwise: weights in another dtype, a
    base in 4 bits, shards."""
    sizes = {spec.name: math.prod(spec.shape) for spec in parameter_table(model)}
    given = options.backend_options
    if options.adapter is not None:
        coded = sum(n for name, n in sizes.items() if name.endswith("_proj.weight"))
        return compute.itemsize * coded if options.adapter.base_bits else 0
    if given.get("offload") == "fsdp":
        return compute.itemsize * sum(sizes.values())
    default: Master = "split" if given.get("offload") == "streaming" else "float32"
    held = WEIGHT_DTYPES[master_option(given, default)]
    return 0 if held == compute else compute.itemsize * sum(sizes.values())
