"""How fast this device copies memory and multiplies matrices, measured: the ceilings of decoding
and of training."""

from __future__ import annotations

import math
import time

import torch

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import MatmulRate

_BYTES = 1 << 28  # far beyond any cache
_ROUNDS = 5


def copy_bytes_per_second(device: torch.device) -> float:
    """The best of several copies between two large tensors; reading and writing both count."""
    source = torch.ones(_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first one touches the pages
        begun = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * _BYTES / best


def matmul_rate(
    model: ModelConfig,
    num_tokens: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 1.0,
) -> MatmulRate:
    """This process's rate now, at the shape of the model's largest layer."""
    shape = max((s.shape for s in parameter_table(model) if s.group == "matrix"), key=math.prod)
    left = torch.randn(num_tokens, shape[1], device=device, dtype=dtype)
    right = torch.randn(shape[1], shape[0], device=device, dtype=dtype)
    out = torch.mm(left, right)
    _synchronize(device)
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        torch.mm(left, right, out=out)
        _synchronize(device)
        count += 1
    operations = 2.0 * num_tokens * math.prod(shape) * count
    spent, used = time.perf_counter() - wall, time.process_time() - cpu
    return MatmulRate(operations / spent, operations / used)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
