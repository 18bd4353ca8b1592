"""Bytes a training session takes, counted from the shapes that `model` and `ops` keep.

`tests/backends/torch/test_memory.py` compares these with a measured session.
"""

from __future__ import annotations

import torch

from solollm.architecture import ModelConfig
from solollm.backend import ComputeDType, MemoryCosts, SessionOptions
from solollm_torch.loss import chunk_rows

CUDA_CONTEXT_BYTES = 600 * 2**20
CPU_PROCESS_BYTES = 300 * 2**20  # the interpreter and PyTorch's libraries
MUON_SCRATCH_BYTES = 6 * 4 * (1 << 22)


def memory_costs(
    model: ModelConfig, options: SessionOptions, compute_dtype: ComputeDType, device: torch.device
) -> MemoryCosts:
    """Coefficients of `solollm.backend.MemoryCosts` for a session on `device`."""
    item = 4 if compute_dtype == "float32" else 2
    hidden, inter = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    # A block keeps: two residual streams and their normalised forms, q, k, v, the attention's
    # output, gate and up, and their product; fp32 statistics beside them.
    statistics = 4 * (model.num_attention_heads + 2)
    kept = item * (4 * hidden + 2 * queries + 2 * keys + 3 * inter) + statistics
    # The widest moment of a block's backward pass: gradients of the product, of gate and up.
    passing = item * (2 * hidden + 4 * inter)
    ends = 12 * hidden  # embedding, final norm and their gradients
    states = 8.0 if options.optimizer.state_bits == 32 else 2.1
    if options.optimizer.name == "muon":
        states /= 2  # of the block matrices; the rest is small
    cast = 2 if item == 2 else 0  # bf16 copies of the weights that backward needs
    chunk = chunk_rows(model.vocab_size, device)
    fixed = CPU_PROCESS_BYTES if device.type == "cpu" else CUDA_CONTEXT_BYTES
    if options.optimizer.name == "muon":
        fixed += MUON_SCRATCH_BYTES
    return MemoryCosts(
        fixed_bytes=fixed,
        per_parameter_bytes=8 + states + cast,
        per_token_bytes=model.num_hidden_layers * kept + passing + ends,
        per_token_checkpointed_bytes=model.num_hidden_layers * item * hidden
        + kept + passing + ends,
        loss_chunk_bytes=chunk * model.vocab_size * (4 if item == 4 else 8),
    )  # fmt: skip
