"""Whether `mx.compile` is used.

Always with fixed shapes: `mx.compile(shapeless=True)` gives wrong numbers where a constant comes
from a shape, and every shape that is met stays compiled for the life of the process.
"""

from __future__ import annotations

import shutil
import sys
import warnings

import mlx.core as mx

from solollm.errors import ConfigError


def should_compile(setting: bool | int | float | str) -> bool:
    """Whether to compile the two functions of a step: `setting` is true, false or auto.

    auto compiles wherever it can. On a Linux CPU MLX calls `g++` for its fused kernels; a Mac needs
    no compiler.

    Raises:
        ConfigError: the setting is none of the three.
    """
    text = str(setting).lower()
    if text not in ("auto", "true", "false"):
        raise ConfigError(f"compile = {setting!r} is not a choice", fix="use auto, true or false")
    if text == "false":
        return False
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    possible = on_gpu or sys.platform == "darwin" or shutil.which("g++") is not None
    if text == "true" and not possible:
        warnings.warn("training runs without mx.compile: there is no `g++`", stacklevel=3)
    return possible
