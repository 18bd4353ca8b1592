"""How fast this device copies memory and multiplies matrices, measured: the ceilings of decoding
and of training. Which dtype is the fastest is in `timing`."""

from __future__ import annotations

import math
import time

import mlx.core as mx

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import ComputeDType, MatmulRate
from solollm_mlx.session import DTYPES

_BYTES = 1 << 28  # far beyond any cache
_ROUNDS = 5


def copy_bytes_per_second() -> float:
    """The best of several passes that read one large array and write another; both count."""
    source = mx.ones((_BYTES // 4,))
    mx.eval(source)
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first one compiles and touches the pages
        begun = time.perf_counter()
        target = source + 1
        mx.eval(target)
        best = min(best, time.perf_counter() - begun)
        del target
    return 2 * _BYTES / best


def matmul_rate(
    model: ModelConfig, num_tokens: int, compute_dtype: ComputeDType, seconds: float = 1.0
) -> MatmulRate:
    """This process's rate now, at the shape of the model's largest layer."""
    shape = max((s.shape for s in parameter_table(model) if s.group == "matrix"), key=math.prod)
    dtype = DTYPES[compute_dtype]
    left = mx.random.normal((num_tokens, shape[1])).astype(dtype)
    right = mx.random.normal(shape).astype(dtype)
    mx.eval(left, right, left @ right.T)
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        mx.eval(left @ right.T)
        count += 1
    operations = 2.0 * num_tokens * math.prod(shape) * count
    spent, used = time.perf_counter() - wall, time.process_time() - cpu
    return MatmulRate(operations / spent, operations / used)
