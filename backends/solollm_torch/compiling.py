"""Compiling blocks, and whether this machine can."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from solollm.errors import ConfigError
from solollm_torch.model import Block


def should_compile(setting: bool | int | float | str, device: torch.device) -> bool:
    """Whether to compile the blocks: `setting` is true, false or auto.

    auto compiles on CUDA, where training is long and the gain large. On the CPU the hand-written
    gradients reach the compiled speed (`docs/results/torch_step_profile.md`) and cost no warm-up.

    Raises:
        ConfigError: the setting is none of the three.
    """
    text = str(setting).lower()
    if text not in ("auto", "true", "false"):
        raise ConfigError(f"compile = {setting!r} is not a choice", fix="use auto, true or false")
    if text == "false" or (text == "auto" and device.type != "cuda"):
        return False
    missing = missing_compiler(device)
    if missing and text == "true":
        warnings.warn(f"training runs without torch.compile: {missing}", stacklevel=3)
    return not missing


def compile_blocks(blocks: Iterable[Block], *, cuda_graphs: bool = False) -> None:
    """Compile every block in place, as one shared kernel set. The first step pays for it; what it
    has made is kept on the disk for the next process.

    `cuda_graphs`: kernels are recorded at their second call and replayed from then on.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernel_cache()))
    for block in blocks:
        block.compile(mode="reduce-overhead" if cuda_graphs else None)


def kernel_cache() -> Path:
    """Where compiled kernels outlive the process and, unlike PyTorch's own choice, a restart."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "solollm" / "kernels"


def missing_compiler(device: torch.device) -> str:
    """Why kernels cannot be compiled here, or the empty string."""
    compiler = os.environ.get("CXX", "g++" if sys.platform != "darwin" else "clang++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler `{compiler}`"
    if device.type == "cuda" and not has_triton():
        return "triton is not installed"
    return ""
