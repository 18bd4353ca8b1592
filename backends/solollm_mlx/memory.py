"""Bytes a training session takes, counted in sessions on a CPU; for a GPU that is a projection.

`tests/backends/mlx/test_memory.py` compares these with measured sessions. Not in them: while a
checkpoint is being written, the state that it holds and the state that training has made since lie
beside each other.
"""

from __future__ import annotations

import math

from solollm.adapters import AdapterOptions, adapter_table, trained_table
from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import ComputeDType, MemoryCosts, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.state_bytes import optimizer_bytes
from solollm_mlx.attention import BLOCK
from solollm_mlx.loss import chunk_tokens, frozen_chunk_tokens
from solollm_mlx.quant import BITS, GROUP_SIZE, fits

PROCESS_BYTES = 280 * 2**20  # the interpreter and the libraries, mlx-lm's included
CHUNK_COPIES = 4  # of one chunk's logits
GRADIENT_BYTES = 4  # per parameter: the sum over micro-batches
RUN_AHEAD = 1.05  # of a step's own memory, see `step_bytes`


def memory_costs(
    model: ModelConfig, options: SessionOptions, compute_dtype: ComputeDType
) -> MemoryCosts:
    """Coefficients of `solollm.backend.MemoryCosts` for a session."""
    item = 4 if compute_dtype == "float32" else 2
    layers, hidden = model.num_hidden_layers, model.hidden_size
    kept, passing, recomputing = _elements_per_token(model)
    tokens_of = chunk_tokens if options.adapter is None else frozen_chunk_tokens
    logits = 4 * CHUNK_COPIES * tokens_of(1 << 30, model.vocab_size) * model.vocab_size
    head_gradient = 4 * model.vocab_size * hidden  # a micro-batch's own, there from the loss on
    moments = optimizer_bytes(model, options.optimizer)
    per_parameter = 4 + GRADIENT_BYTES + moments / model.num_parameters()
    if options.adapter is not None:
        held = adapter_bytes(model, options.adapter, options.optimizer, item)
        per_parameter = sum(held.values()) / model.num_parameters()
        head_gradient = 0
    return MemoryCosts(
        fixed_bytes=PROCESS_BYTES,
        per_parameter_bytes=per_parameter,
        per_token_bytes=item * (layers * kept + passing),
        per_token_checkpointed_bytes=item * (layers * hidden + recomputing),
        loss_chunk_bytes=logits + head_gradient,
    )


def adapter_bytes(
    model: ModelConfig, adapter: AdapterOptions, table: OptimizerTable, item: int
) -> dict[str, int]:
    """What an adapter session holds, by what it is: a frozen base in the compute dtype of `item`
    bytes, or in codes; factors, their gradients and moments in fp32."""
    base = 0.0
    for spec in parameter_table(model):
        size = math.prod(spec.shape)
        is_coded = adapter.base_bits and spec.name.endswith("_proj.weight") and fits(spec.shape)
        base += size * (BITS / 8 + 2 * item / GROUP_SIZE if is_coded else item)
    factors = sum(math.prod(spec.shape) for spec in adapter_table(model, adapter))
    return {
        "frozen base": int(base),
        "adapter": 4 * factors,
        "gradients": GRADIENT_BYTES * factors,
        "optimizer": optimizer_bytes(model, table, adapter),
    }


def step_bytes(model: ModelConfig, options: SessionOptions, plan: Plan) -> int:
    """What a step needs beside weights and optimizer state.

    MLX's evaluator runs ahead of the processor, and allocates for what it has not begun to compute;
    bound to this it waits where nothing is gained by going on.
    """
    costs = memory_costs(model, options, plan.compute_dtype)
    per_token = (
        costs.per_token_checkpointed_bytes
        if plan.activation_checkpointing
        else costs.per_token_bytes
    )
    accumulated = plan.micro_batch_size < plan.batch_size
    activations = per_token * plan.micro_batch_size * plan.seq_len
    trained = sum(math.prod(spec.shape) for spec in trained_table(model, options.adapter))
    gradients = GRADIENT_BYTES * trained * accumulated
    return int(RUN_AHEAD * (activations + costs.loss_chunk_bytes + gradients))


def _elements_per_token(model: ModelConfig) -> tuple[float, float, float]:
    """Of a block kept for backward; of everything else; of everything but the residual streams
    where blocks are recomputed. Fitted to peaks of models that differ in one size each. Rows no
    longer than a block keep their attention probabilities; of longer ones, those of one layer are
    there at a time."""
    hidden, inter, length = (
        model.hidden_size, model.intermediate_size, model.max_position_embeddings,
    )  # fmt: skip
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    is_short = length <= BLOCK
    probabilities = model.num_attention_heads * length
    kept = 6.8 * hidden + 3.0 * queries + 1.4 * keys + 3.3 * inter
    kept += probabilities if is_short else 2.0 * queries
    passing = 4.1 * hidden + queries + 0.8 * keys + 2.0 * inter
    passing += probabilities * (0.5 if is_short else 1.5)
    recomputing = 20.0 * hidden + 5 * queries + 7 * keys + 13 * inter
    recomputing += 0.0 if is_short else 1.5 * probabilities
    return kept, passing, recomputing
