"""How many bytes a streamed step moves, and where its memory goes: formulas, for the planner.

The session counts what it really moves; the two are equal (`tests/backends/torch/test_offload.py`).
With L blocks, S slots, weights of W bytes and residuals and states of U bytes per block, and n
micro-batches, a step that follows another loads

    2 n (L - S) W      forward and backward; the blocks in the slots at the turning points stay
    + L W              exact clipping: the updates come after the last backward pass (a block that
                       has a slot to itself, where L < 2 S, stays there)
    + L U + ends       what an update needs besides the weights

and stores L (W + U) and the ends'. Offloaded residuals go down once and up once per micro-batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from solollm.architecture import ModelConfig
from solollm.config import OptimizerTable
from solollm_torch.layout import (
    BlockLayout,
    end_specs,
    slot_bytes,
    update_bytes_per_element,
)
from solollm_torch.masters import WEIGHT_DTYPES, Master


class Streaming(NamedTuple):
    """How a streaming session is set up, as far as its bytes depend on it."""

    master: Master = "split"
    num_slots: int = 2
    offload_residuals: bool = False


class Traffic(NamedTuple):
    """Bytes of one optimizer step, host to device and device to host."""

    loaded: int
    stored: int


def step_traffic(
    model: ModelConfig,
    table: OptimizerTable,
    how: Streaming,
    *,
    num_micro_batches: int,
    residual_bytes: int = 0,
) -> Traffic:
    """`residual_bytes`: of one block's input over all micro-batches, [B, T, C]."""
    layout, blocks = BlockLayout.of(model, table, how.master), model.num_hidden_layers
    absent = blocks - min(how.num_slots, blocks)
    passes = 2 * num_micro_batches * absent
    if table.clip == "exact":
        passes += blocks - min(blocks, max(0, 2 * how.num_slots - blocks))
    item = WEIGHT_DTYPES[how.master].itemsize
    ends = [(math.prod(s.shape), update_bytes_per_element(s, table, how.master))
            for s in end_specs(model)]  # fmt: skip
    updates = blocks * layout.update_bytes + sum(count * each for count, each in ends)
    weights = blocks * layout.weight_bytes + sum(count * item for count, _ in ends)
    residuals = (blocks - 1) * residual_bytes if how.offload_residuals else 0
    return Traffic(
        passes * layout.weight_bytes + updates + residuals, weights + updates + residuals
    )


def device_bytes(
    model: ModelConfig, table: OptimizerTable, how: Streaming, *, gradient_item: int, chunk: int
) -> dict[str, int]:
    """What lies on the device from beginning to end, by name: a block's activations, the loss's
    chunk and the block inputs come to it. `chunk`: elements that an update decodes at once."""
    layout, item = BlockLayout.of(model, table, how.master), WEIGHT_DTYPES[how.master].itemsize
    ends = sum(math.prod(spec.shape) for spec in end_specs(model))
    return {
        "weight slots": min(how.num_slots, model.num_hidden_layers) * layout.weight_bytes,
        "update slots": 2 * slot_bytes(model, table, how.master, chunk),
        "embedding, norm, head": item * ends,
        "gradients": gradient_item * model.num_parameters(),
    }


def host_bytes(model: ModelConfig, table: OptimizerTable, master: Master) -> int:
    """Of the pinned buffers that hold weights, residuals and states."""
    layout = BlockLayout.of(model, table, master)
    item = WEIGHT_DTYPES[master].itemsize
    ends = sum(
        math.prod(s.shape) * (item + update_bytes_per_element(s, table, master))
        for s in end_specs(model)
    )
    return model.num_hidden_layers * (layout.weight_bytes + layout.update_bytes) + ends
