"""How much of a Mac MLX may take: memory, its cache, wired memory, one buffer.

MLX's own defaults are made for a process that has the machine to itself: memory of 1.5 times what
Metal recommends, and a cache as large. In training that ends in swapping, or, with too much of the
memory wired, in a panic of the whole Mac (mlx #3186, #3346).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import Plan
from solollm.errors import BackendError

_USABLE_SHARE = 0.9  # of what Metal recommends; the rest is the display's and other programs'
_CACHE_BYTES = 2 << 30
_WIRED_MARGIN = 1.1  # of weights, gradients and optimizer


class DeviceLimits(NamedTuple):
    """What Metal says of its GPU, in bytes: memory it recommends to use, the largest buffer."""

    working_set_bytes: int
    buffer_bytes: int


class MemoryBounds(NamedTuple):
    """What MLX is bound to, in bytes."""

    memory_bytes: int
    cache_bytes: int
    wired_bytes: int


def device_limits() -> DeviceLimits | None:
    """The GPU's; None on a CPU, whose memory is bound by nothing but the plan."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    info = mx.device_info()
    return DeviceLimits(
        int(info.get("max_recommended_working_set_size", 0)), int(info.get("max_buffer_length", 0))
    )


def memory_bounds(limits: DeviceLimits, plan: Plan) -> MemoryBounds:
    """Bounds for one session. Wired is only what every step touches, never all that is allowed."""
    most = int(limits.working_set_bytes * _USABLE_SHARE)
    resident = plan.memory_bytes.get("weights, gradients, optimizer", 0)
    return MemoryBounds(
        memory_bytes=most,
        cache_bytes=min(_CACHE_BYTES, limits.working_set_bytes // 8),
        wired_bytes=min(int(resident * _WIRED_MARGIN), most),
    )


def bind_memory(limits: DeviceLimits, plan: Plan) -> None:
    """Bind this process. Wiring needs macOS 15; before, it is the system's to decide."""
    if not limits.working_set_bytes:
        return
    bounds = memory_bounds(limits, plan)
    mx.set_memory_limit(bounds.memory_bytes)
    mx.set_cache_limit(bounds.cache_bytes)
    mx.set_wired_limit(bounds.wired_bytes)


@contextmanager
def bounded_run_ahead(step_bytes: int) -> Iterator[None]:
    """Let MLX allocate ahead of the computation only as long as this many bytes, beside what is
    held now, are not passed. The limit refuses nothing: it makes the evaluator wait."""
    outer = mx.set_memory_limit(mx.get_active_memory() + step_bytes)
    mx.set_memory_limit(min(outer, mx.get_active_memory() + step_bytes))
    try:
        yield
    finally:
        mx.set_memory_limit(outer)


def require_buffers(model: ModelConfig, plan: Plan, limits: DeviceLimits) -> None:
    """Raise BackendError where one array of a step is larger than one Metal buffer may be: a
    matrix, or the widest activation of a micro-batch. (Logits are made in chunks.)"""
    item = 4 if plan.compute_dtype == "float32" else 2
    rows = plan.micro_batch_size * plan.seq_len
    sizes = {
        f"the activations of a micro-batch of {plan.micro_batch_size}": (
            rows * model.intermediate_size * item
        )
    }
    for spec in parameter_table(model):
        count = 1
        for length in spec.shape:
            count *= length
        sizes[spec.name] = 4 * count
    name = max(sizes, key=lambda key: sizes[key])
    if limits.buffer_bytes and sizes[name] > limits.buffer_bytes:
        raise BackendError(
            f"{name} takes {sizes[name]:,} bytes, and one buffer of this GPU holds at most"
            f" {limits.buffer_bytes:,}",
            why="Metal caps the length of a single buffer",
            fix="set a smaller train.micro_batch_size, data.seq_len or model",
        )
