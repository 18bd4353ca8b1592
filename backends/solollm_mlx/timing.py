"""How fast each compute dtype is here: not every chip has bf16, and those without emulate it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx

from solollm.backend import ComputeDType
from solollm_mlx.session import DTYPES

_SIZE = 2048  # rows and columns: large enough for a GPU to reach its rate


def matmul_rates(
    dtypes: Sequence[ComputeDType], seconds: float, size: int = _SIZE
) -> dict[ComputeDType, float]:
    """Operations per second of a square matrix product in each dtype, the median of rounds that
    take about `seconds` for all of them together."""
    arrays = {name: mx.random.normal((size, size)).astype(DTYPES[name]) for name in dtypes}
    rounds: dict[ComputeDType, list[float]] = {name: [] for name in dtypes}
    for array in arrays.values():
        mx.eval(array @ array)  # the first one compiles a kernel
    begun = time.perf_counter()
    # In turns, so that a chip that gets warm on the way slows all of them alike.
    while time.perf_counter() - begun < seconds or not rounds[dtypes[0]]:
        for name, array in arrays.items():
            start = time.perf_counter()
            mx.eval(array @ array)
            rounds[name].append(2 * size**3 / (time.perf_counter() - start))
    return {name: sorted(rates)[len(rates) // 2] for name, rates in rounds.items()}
