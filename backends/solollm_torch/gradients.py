"""Where gradients lie: slices of one vector per session, added to in place, zeroed in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from solollm.errors import ConfigError
from solollm_torch.masters import Master

ALIGNMENT = 16  # elements: gradients start on cache lines, as allocations of their own would
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gradient_dtype(
    given: Mapping[str, bool | int | float | str], master: Master, compute: torch.dtype
) -> torch.dtype:
    """The option `gradients`: float32, bfloat16, or auto.

    auto is bfloat16 where weights and arithmetic are: then each micro-batch's gradient is rounded
    as it is added. Raises ConfigError for anything else, and for bfloat16 with float32 masters.
    """
    chosen = str(given.get("gradients", "auto"))
    if chosen == "auto":
        narrow = master != "float32" and compute == torch.bfloat16
        return torch.bfloat16 if narrow else torch.float32
    if chosen not in DTYPES:
        raise ConfigError(
            f"gradients = {chosen!r} is not a dtype for them", fix="use auto, float32 or bfloat16"
        )
    if chosen == "bfloat16" and master == "float32":
        raise ConfigError(
            "gradients = bfloat16 goes with bfloat16 weights only",
            why="this session holds its weights in float32, and their gradients with them",
            fix="set master = split as well, which loses nothing",
        )
    return DTYPES[chosen]


def padded_size(parameters: Sequence[Tensor]) -> int:
    """Elements of a vector that holds a gradient for each."""
    return sum(_padded(p) for p in parameters)


def attach_gradients(parameters: Sequence[nn.Parameter], vector: Tensor) -> None:
    """Give every parameter its gradient: a slice of `vector`, of `padded_size` elements."""
    slices = torch.split(vector, [_padded(p) for p in parameters])
    for parameter, part in zip(parameters, slices, strict=True):
        if parameter.dtype != vector.dtype:
            parameter.grad_dtype = vector.dtype
        parameter.grad = part[: parameter.numel()].view_as(parameter)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The attached gradient."""
    assert parameter.grad is not None, "gradients are allocated with the session"
    return parameter.grad


def _padded(parameter: Tensor) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
