"""How many bytes the state of a training takes: a count of the name table, exact to the byte.

The canonical tensors are the same on every backend, so weights, optimizer states and checkpoints
are counted here once. What a backend keeps beside them (activations, buffers, copies) is its own
to say, in `Backend.memory_costs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from solollm.adapters import AdapterOptions, trained_table
from solollm.architecture import ModelConfig, ParameterSpec
from solollm.config import OptimizerTable
from solollm.optim_codec import StateDType, num_blocks, state_dtype

ITEM_BYTES: Mapping[StateDType, int] = {"F32": 4, "BF16": 2, "U8": 1}
_CHECKPOINT_EXTRAS = 4 << 20  # tokenizer, configuration, certificate: a few megabytes at most


def weight_bytes(model: ModelConfig, item_bytes: int = 4) -> int:
    """All weights at so many bytes each."""
    return item_bytes * model.num_parameters()


def optimizer_bytes(
    model: ModelConfig, table: OptimizerTable, adapter: AdapterOptions | None = None
) -> int:
    """The moments of AdamW or Muon, as the optimizer holds them and as a checkpoint stores them."""
    return sum(_state_bytes(spec, table) for spec in trained_table(model, adapter))


def checkpoint_bytes(
    model: ModelConfig, table: OptimizerTable, adapter: AdapterOptions | None = None
) -> int:
    """One checkpoint's size on the disk, to within its small files: fp32 masters and moments of
    what is trained."""
    weights = 4 * sum(math.prod(spec.shape) for spec in trained_table(model, adapter))
    return weights + optimizer_bytes(model, table, adapter) + _CHECKPOINT_EXTRAS


def _state_bytes(spec: ParameterSpec, table: OptimizerTable) -> int:
    numel = math.prod(spec.shape)
    count = 1 if table.name == "muon" and spec.group == "matrix" else 2
    dtype = state_dtype(spec.shape, spec.group, table.state_bits)
    scales = 4 * num_blocks(spec.shape) if dtype == "U8" else 0
    return count * (ITEM_BYTES[dtype] * numel + scales)
