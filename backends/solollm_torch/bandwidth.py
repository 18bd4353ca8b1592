"""How fast this device copies memory: the ceiling of decoding, measured."""

from __future__ import annotations

import time

import torch

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
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * _BYTES / best
