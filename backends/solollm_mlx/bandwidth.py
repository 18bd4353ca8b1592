"""How fast this device copies memory: the ceiling of decoding, measured."""

from __future__ import annotations

import time

import mlx.core as mx

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
