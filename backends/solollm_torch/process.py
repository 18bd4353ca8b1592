"""What belongs to the process and not to a session: threads, determinism, memory."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

from solollm.backend import MemoryStats
from solollm.errors import ConfigError, nearest
from solollm_torch.kept_mappings import give_back, keep_freed_memory

_CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux; 5 sets the peak to what is held: proc(5)


def set_up_process(
    given: Mapping[str, bool | int | float | str], device: torch.device, known: Sequence[str]
) -> None:
    """Threads and determinism belong to the process, not to a session: the last one set wins."""
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown torch backend option `{key}`", fix=nearest(key, known))
    if "threads" in given:
        torch.set_num_threads(int(given["threads"]))
    if device.type == "cpu" and "deterministic" in given:
        warnings.warn("`deterministic` has no effect on the CPU: it always is", stacklevel=4)
    elif given.get("deterministic", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses the mode
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        keep_freed_memory()


def memory_stats(device: torch.device) -> MemoryStats:
    """What a card's allocator has given out, or the memory of this process."""
    if device.type == "cuda":
        allocated, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
        return MemoryStats(allocated(device), peak(device))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return MemoryStats(psutil.Process().memory_info().rss, peak_bytes)


def counts_peaks(device: torch.device) -> bool:
    """Whether `restart_peak` works on this system."""
    return device.type == "cuda" or os.access(_CLEAR_REFS, os.W_OK)


def restart_peak(device: torch.device) -> None:
    """Count the peak from now on. What was freed and kept (see `keep_freed_memory`) goes back to
    the system first, else the next peak would hide in there."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # or it knows no device yet
        torch.cuda.reset_peak_memory_stats(device)
        return
    give_back()
    _CLEAR_REFS.write_text("5", encoding="ascii")
