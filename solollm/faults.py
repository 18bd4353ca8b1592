"""Failures of the machine under a healthy run: what a restart mends and what needs less memory.

A framework reports them as errors of many types, so they are told by their texts. Whoever trains
notes them as an event of the run; `solollm.supervisor` reads it after the process has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from solollm.runs import Run

FaultKind = Literal["memory", "gpu"]
_TYPES = ("OutOfMemoryError",)  # torch's, of cards
_MEMORY_TEXTS = (
    "kIOGPUCommandBufferCallbackErrorOutOfMemory",  # Metal
    "greater than the maximum allowed buffer size",  # MLX on Metal
    "[malloc] Unable to allocate",  # MLX
    "[malloc_or_wait] Unable to allocate",  # MLX of older versions
    "can't allocate memory",  # torch on a processor
    "CUDA out of memory",
    "CUDA error: out of memory",
)
_GPU_TEXTS = (
    "[METAL] Command buffer execution failed",  # the watchdog's too: "Impacting Interactivity"
    "kIOGPUCommandBufferCallbackError",
    "[metal::malloc] Resource limit",  # a new process starts counting its buffers anew
    "CUDA error",
)


def fault_kind(error: BaseException | None) -> FaultKind | None:
    """What has failed under `error` or what it was raised from; None: the run's own error."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or type(error).__name__ in _TYPES:
            return "memory"
        if any(part in text for part in _MEMORY_TEXTS):
            return "memory"
        if any(part in text for part in _GPU_TEXTS):
            return "gpu"
        error = error.__cause__
    return None


@contextmanager
def noting_faults(run: Run) -> Iterator[None]:
    """Write down a failure of the machine as an event `fault` on its way out."""
    try:
        yield
    except Exception as error:
        kind = fault_kind(error)
        if kind is not None:
            run.append_event("fault", fault=kind, error=str(error).splitlines()[0][:300])
        raise
