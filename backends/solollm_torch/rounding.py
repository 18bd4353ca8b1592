"""Stochastic rounding to bfloat16: the counter-based bits of `solollm.optim_codec` in torch, equal
to them bit for bit.

Torch has no unsigned 32-bit arithmetic on every device; int32 wraps around alike, and a mask after
each shift takes away the sign that an arithmetic shift drags along.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97 - (1 << 32))  # of `optim_codec._mix`, as signed integers


def counter_bits(
    key: tuple[int, int], count: int, *, offset: int = 0, device: torch.device
) -> Tensor:
    """int32 [count]: `optim_codec.counter_bits` of the stream that `counter_key` gave, for elements
    from `offset` on; only the bits mean anything, not the sign."""
    index = torch.arange(offset, offset + count, device=device)  # int64: more than 2^31 elements
    bits = index.to(torch.int32)
    for word in key:
        _mix_in_place(bits.bitwise_xor_(_signed(word)))
    return bits


def round_stochastically(values: Tensor, target: Tensor, bits: Tensor) -> None:
    """Write finite float32 `values` into bfloat16 `target`, up or down as `bits` (int32) decide.

    All are of one shape; `values` and `bits` are overwritten.
    """
    raised = values.view(torch.int32).add_(bits.bitwise_and_(0xFFFF))
    target.view(torch.int16).copy_(raised.bitwise_right_shift_(16))


def _mix_in_place(x: Tensor) -> None:
    x.bitwise_xor_(_shifted(x, 16)).mul_(_MULTIPLIERS[0])
    x.bitwise_xor_(_shifted(x, 15)).mul_(_MULTIPLIERS[1])
    x.bitwise_xor_(_shifted(x, 15))


def _shifted(x: Tensor, count: int) -> Tensor:
    """x >> count of the unsigned number."""
    return x.bitwise_right_shift(count).bitwise_and_((1 << (32 - count)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
