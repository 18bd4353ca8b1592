"""The matrices of compiled blocks in the dtype that is computed in, beside masters that are wider.

Left to itself a compiled block narrows its matrices in every micro-batch, keeps the copies for its
backward pass, and widens every gradient before autograd adds it: 26 bytes of memory traffic per
weight and micro-batch. Here the copies are made once per update and are what the block computes
with; its gradients come out narrow and are added to the wide ones as they are: 12 bytes. The
numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from solollm_torch.gradients import gradient_of
from solollm_torch.model import Block, Decoder


class _Matrix(NamedTuple):
    block: Block
    name: str
    wide: nn.Parameter
    narrow: nn.Parameter


class NarrowedWeights:
    """What has taken the place of some matrices; of none, until `narrow_blocks` makes it."""

    def __init__(self) -> None:
        self.matrices: list[_Matrix] = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what the masters are now."""
        for matrix in self.matrices:
            matrix.narrow.copy_(matrix.wide)

    @contextmanager
    def wide_again(self) -> Iterator[None]:
        """The masters are back in the blocks, for whoever wants them as they are."""
        for block, name, wide, _ in self.matrices:
            setattr(block, name, wide)
        try:
            yield
        finally:
            for block, name, _, narrow in self.matrices:
                setattr(block, name, narrow)


def narrow_blocks(decoder: Decoder) -> NarrowedWeights:
    """Put narrow copies in the place of all blocks' matrices whose masters are wider than what is
    computed in. Their gradients are attached, and stay where they are."""
    narrowed, dtype = NarrowedWeights(), decoder.compute_dtype
    for block in decoder.layers:
        for name, wide in list(block.named_parameters(recurse=False)):
            if wide.ndim != 2 or wide.dtype.itemsize <= dtype.itemsize:
                continue
            narrow = nn.Parameter(torch.empty_like(wide, dtype=dtype))
            add = _added_to(gradient_of(wide))
            narrow.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
            setattr(block, name, narrow)
            narrowed.matrices.append(_Matrix(block, name, wide, narrow))
    narrowed.refresh()
    return narrowed


def _added_to(gradient: Tensor) -> Callable[[Tensor], None]:
    def add(narrow: Tensor) -> None:
        assert narrow.grad is not None, "the hook runs where it has come"
        gradient.add_(narrow.grad)
        narrow.grad = None

    return add
