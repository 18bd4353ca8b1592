"""Bytes of a session whose state lies in the host's memory, on both sides, and what it moves.

Counted from what `offload` and `sharding` allocate; `tests/backends/torch/test_memory_offload.py`
compares the lines with real sessions. The formulas of the copies are `traffic`'s.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from solollm.architecture import ModelConfig
from solollm.backend import ComputeDType, MemoryCosts, SessionOptions
from solollm.state_bytes import weight_bytes
from solollm_torch.gradients import DTYPES, gradient_dtype
from solollm_torch.masters import master_option
from solollm_torch.optim import chunk_elements
from solollm_torch.residuals import NUM_SLOTS as NUM_RESIDUAL_SLOTS
from solollm_torch.traffic import Streaming, device_bytes, host_bytes, step_traffic


def streaming_state_bytes(
    model: ModelConfig, options: SessionOptions, dtype: ComputeDType, device: torch.device
) -> dict[str, int]:
    """What a streaming session keeps on the device between steps: exact, by what it is."""
    given = options.backend_options
    how = Streaming(master_option(given, "split"), int(given.get("slots", 2)))
    gradients = gradient_dtype(given, how.master, DTYPES[dtype])
    return device_bytes(
        model, options.optimizer, how,
        gradient_item=gradients.itemsize, chunk=chunk_elements(device),
    )  # fmt: skip


def streaming_host_bytes(model: ModelConfig, options: SessionOptions) -> dict[str, int]:
    """The pinned memory of a streaming session, but for block inputs."""
    master = master_option(options.backend_options, "split")
    return {"weights, residuals, moments": host_bytes(model, options.optimizer, master)}


def streaming_traffic_bytes(model: ModelConfig, options: SessionOptions) -> dict[str, int]:
    """Bytes to the device, the busier way: per micro-batch and per update."""
    given = options.backend_options
    how = Streaming(master_option(given, "split"), int(given.get("slots", 2)))
    one, two = (
        step_traffic(model, options.optimizer, how, num_micro_batches=count).loaded
        for count in (1, 2)
    )
    return {"micro-batch": two - one, "update": 2 * one - two}


def streaming_costs(
    costs: MemoryCosts,
    model: ModelConfig,
    options: SessionOptions,
    dtype: ComputeDType,
    *,
    device: torch.device,
) -> MemoryCosts:
    """The costs of a resident session turned into those of a streaming one. Recomputed blocks leave
    their inputs, on the device or, with `offload_residuals`, in the host's memory."""
    state = streaming_state_bytes(model, options, dtype, device)
    residual = model.hidden_size * DTYPES[dtype].itemsize
    offloads = bool(options.backend_options.get("offload_residuals", False))
    kept = model.num_hidden_layers * residual
    on_device = costs.per_token_checkpointed_bytes
    if offloads:
        on_device += (NUM_RESIDUAL_SLOTS + 1) * residual - kept
    return replace(
        costs,
        per_parameter_bytes=sum(state.values()) / model.num_parameters(),
        per_token_checkpointed_bytes=on_device,
        state_bytes=state,
        host_bytes=streaming_host_bytes(model, options),
        host_per_token_bytes=float(kept if offloads else 0),
        traffic_bytes=streaming_traffic_bytes(model, options),
        overlaps_copies=True,
    )


def sharded_traffic_bytes(model: ModelConfig) -> dict[str, int]:
    """FSDP2 from host memory moves the fp32 weights up for each pass of each micro-batch."""
    return {"micro-batch": 2 * weight_bytes(model)}
