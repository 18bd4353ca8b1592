"""An exact float32 weight in two halves: bfloat16 to compute with, int16 for what that leaves out.

    high = (bits + 0x8000) >> 16          the weight rounded to bf16, halves away from zero
    low  = bits - (high << 16)            in [-0x8000, 0x7FFF]
    bits = (high << 16) + low             exact, for every bit pattern

`bits` are those of the float32 as a 32-bit integer, and all arithmetic wraps around. The forward
pass reads `high` as it is; an update joins both, computes in float32 and splits again. Together
they take the four bytes of the float32 they stand for, but only the two of `high` are needed to
compute: what streams through a card is halved, and no precision is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = 0x8000


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 weights, a new tensor, of bfloat16 `high` and int16 `low` of one shape."""
    bits = high.view(torch.int16).to(torch.int32)
    return bits.bitwise_left_shift_(16).add_(low).view(torch.float32)


def split(weights: Tensor, high: Tensor, low: Tensor) -> None:
    """Write float32 `weights` into bfloat16 `high` and int16 `low` of the same shape."""
    bits = weights.view(torch.int32)
    upper = (bits + HALF).bitwise_right_shift_(16)
    high.view(torch.int16).copy_(upper)
    low.copy_(torch.sub(bits, upper.bitwise_left_shift_(16), out=upper))
