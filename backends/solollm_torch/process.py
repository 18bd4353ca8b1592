"""What belongs to the process and not to a session: threads, determinism, the allocator."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence

import torch

from solollm.errors import ConfigError, nearest
from solollm_torch.compiling import keep_freed_memory


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
