"""AdamW over 8-bit moments as one compiled pass over memory: a switch for cards, off until timed.

Operation by operation (`optim`, `codec`) such an update reads and writes its numbers some forty
times over; compiled, a block of 256 is decoded, updated and encoded where it is. The formula and
the codec are the same. The compiler joins products and sums, so that a code may differ by one from
what single operations give; it does so in every session alike.

Shapes: N blocks of 256 elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from solollm.config import OptimizerTable
from solollm.optim_codec import BLOCK_SIZE
from solollm_torch.codec import CodedState, Tables, tables_of
from solollm_torch.split_master import join, split
from solollm_torch.storage import Plain, Split, Storage


class Numbers(NamedTuple):
    """What changes from step to step, 0-dim fp32 on the device: no step compiles anew."""

    lr: Tensor
    correction: Tensor  # 1 - beta1 ** t
    root_correction: Tensor  # sqrt(1 - beta2 ** t)
    grad_scale: Tensor
    found_inf: Tensor

    @classmethod
    def of(
        cls, table: OptimizerTable, device: torch.device, *, lr: float, updates: int,
        grad_scale: Tensor | None, found_inf: Tensor | None,
    ) -> Numbers:  # fmt: skip
        """`updates`: how many were applied before this one.

        Filled by the device: a copy from the host would wait for all that is queued there.
        """
        t = updates + 1
        given = (lr, 1 - table.beta1**t, math.sqrt(1 - table.beta2**t), 1.0, 0.0)
        lr_, correction, root, one, zero = (torch.full((), x, device=device) for x in given)
        return cls(
            lr_, correction, root, one if grad_scale is None else grad_scale,
            zero if found_inf is None else found_inf,
        )  # fmt: skip


def can_compile(master: Storage, first: Storage, second: Storage, num_elements: int) -> bool:
    """Whether a parameter is held so, and in whole blocks."""
    is_coded = isinstance(first, CodedState) and isinstance(second, CodedState)
    return is_coded and isinstance(master, Plain | Split) and num_elements % BLOCK_SIZE == 0


def coded_adamw(
    stored: tuple[Storage, Storage, Storage],
    chunk: slice,
    gradient: Tensor,
    numbers: Numbers,
    *,
    table: OptimizerTable,
    decay: bool,
) -> None:
    """Update a slice of whole blocks in place; `gradient` is that of the slice, flat.

    `stored`: master and both moments, of which `can_compile` is true.
    """
    master, first, second = stored
    assert isinstance(first, CodedState)
    assert isinstance(second, CodedState)
    assert isinstance(master, Plain | Split)
    blocks = slice(chunk.start // BLOCK_SIZE, chunk.stop // BLOCK_SIZE)
    _compiled()(
        tuple(_rows(part[chunk]) for part in master),
        _rows(gradient),
        tuple((_rows(s.codes[chunk]), _alone(s.absmax[blocks]),
               tables_of(s.state, s.codes.device)) for s in (first, second)),
        numbers, beta1=table.beta1, beta2=table.beta2, eps=table.eps,
        weight_decay=table.weight_decay if decay else 0.0,
    )  # fmt: skip


def _rows(flat: Tensor) -> Tensor:
    return _alone(flat.view(-1, BLOCK_SIZE))


def _alone(stretch: Tensor) -> Tensor:
    """The same memory as a tensor with a storage of its own, of any number of blocks.

    Streaming lays a unit's whole state into one buffer, and the compiler refuses tensors of several
    dtypes in one storage that it is to change, and compiles anew for other places in it.
    """
    alone: Tensor = from_dlpack(to_dlpack(stretch))
    torch._dynamo.maybe_mark_dynamic(alone, 0)
    return alone


@functools.cache
def _compiled() -> Callable[..., None]:
    """Only the number of blocks varies: a row of known length stays in registers between what is
    decoded and what is encoded, one of any length would go through memory."""
    return torch.compile(_update, fullgraph=True)


_Coded = tuple[Tensor, Tensor, Tables]  # codes [N, 256], absmax [N]


def _update(
    weights: tuple[Tensor, ...],
    gradient: Tensor,
    moments: tuple[_Coded, _Coded],
    numbers: Numbers,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    first, second = moments
    weight = join(*weights) if len(weights) == 2 else weights[0]
    scaled = gradient.float() * numbers.grad_scale
    exp_avg, exp_avg_sq = _decode(first), _decode(second)
    exp_avg = torch.lerp(exp_avg, scaled, 1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + scaled * scaled * (1 - beta2)
    root = exp_avg_sq.sqrt() / numbers.root_correction + eps
    changed = weight * (1 - numbers.lr * weight_decay)
    changed = changed - numbers.lr / numbers.correction * exp_avg / root
    is_bad = numbers.found_inf > 0
    changed = torch.where(is_bad, weight, changed)
    _encode(first, exp_avg, is_bad)
    _encode(second, exp_avg_sq, is_bad)
    if len(weights) == 2:
        split(changed, *weights)
    else:
        weights[0].copy_(changed)


def _decode(coded: _Coded) -> Tensor:
    codes, absmax, tables = coded
    return tables.levels[codes.int()] * absmax.unsqueeze(1)


def _encode(coded: _Coded, values: Tensor, is_bad: Tensor) -> None:
    codes, absmax, tables = coded
    largest = values.abs().amax(dim=1)
    scaled = values / torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    low = tables.low[(scaled.view(torch.int32) >> 16) & 0xFFFF]
    found = low + (scaled > tables.borders[low])
    codes.copy_(torch.where(is_bad, codes, found.to(torch.uint8)))
    absmax.copy_(torch.where(is_bad, absmax, largest))
