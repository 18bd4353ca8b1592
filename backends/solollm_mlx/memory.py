"""Bytes a training session takes, counted in sessions on a CPU; for a GPU that is a projection.

`tests/backends/mlx/test_memory.py` compares these with measured sessions. Not in them: while a
checkpoint is being written, the state that it holds and the state that training has made since lie
beside each other.
"""

from __future__ import annotations

from solollm.architecture import ModelConfig
from solollm.backend import ComputeDType, MemoryCosts, SessionOptions
from solollm_mlx.attention import BLOCK
from solollm_mlx.loss import CHUNK_BYTES
from solollm_mlx.optim import GROUP_ELEMENTS

PROCESS_BYTES = 280 * 2**20  # the interpreter and the libraries, mlx-lm's included
UPDATE_COPIES = 8  # of one group of tensors: old and new states, and what lies between
CHUNK_COPIES = 3  # of one chunk's logits
GRADIENT_BYTES = 7  # per parameter: the sum, and part of a micro-batch's own


def memory_costs(
    model: ModelConfig, options: SessionOptions, compute_dtype: ComputeDType
) -> MemoryCosts:
    """Coefficients of `solollm.backend.MemoryCosts` for a session."""
    item = 4 if compute_dtype == "float32" else 2
    layers, hidden = model.num_hidden_layers, model.hidden_size
    kept, passing, recomputing = _elements_per_token(model)
    group_bytes = 4 * min(GROUP_ELEMENTS, model.num_parameters())
    return MemoryCosts(
        fixed_bytes=PROCESS_BYTES + UPDATE_COPIES * group_bytes,
        per_parameter_bytes=4 + GRADIENT_BYTES + _state_bytes_per_parameter(model, options),
        per_token_bytes=item * (layers * kept + passing),
        per_token_checkpointed_bytes=item * (layers * hidden + recomputing),
        loss_chunk_bytes=CHUNK_COPIES * CHUNK_BYTES,
    )


def _elements_per_token(model: ModelConfig) -> tuple[float, float, float]:
    """Of a block kept for backward; of everything else; of everything but the residual streams
    where blocks are recomputed. Fitted to peaks of models that differ in one size each."""
    hidden, inter = model.hidden_size, model.intermediate_size
    heads = (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    # Short rows keep their attention probabilities; long ones make them block by block.
    positions = min(model.max_position_embeddings, 2 * BLOCK)
    probabilities = model.num_attention_heads * positions
    is_short = model.max_position_embeddings <= 2 * BLOCK
    kept = 4 * hidden + 3 * heads + 4 * inter + is_short * probabilities
    passing = 14 * hidden + 6 * inter + 2.5 * probabilities
    recomputing = 20 * hidden + 7 * heads + 13 * inter + 3.3 * probabilities
    return kept, passing, recomputing


def _state_bytes_per_parameter(model: ModelConfig, options: SessionOptions) -> float:
    """AdamW keeps two moments, Muon one for the matrices; in 8 bits those of matrices only."""
    item = 4.0 if options.optimizer.state_bits == 32 else 1.02
    matrices = model.num_matrix_parameters() - model.vocab_size * model.hidden_size
    share = matrices / model.num_parameters()
    moments = 1 if options.optimizer.name == "muon" else 2
    return share * moments * item + (1 - share) * 2 * 4
