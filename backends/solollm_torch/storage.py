"""How a weight or optimizer state lies in memory, and how a stretch of it becomes float32 and back.

An update decodes a stretch of everything, computes in float32 and encodes it again. Every class
here works on flattened memory that somebody else owns, and writes to it in place. `step`, the
number of updates applied before, selects the random bits of stochastic rounding. The 8-bit codes
are in `codec`, the halves of a split weight in `split_master`, the random bits in `rounding`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from solollm.optim_codec import counter_key
from solollm_torch.rounding import counter_bits, round_stochastically
from solollm_torch.split_master import join, split


class Storage(Protocol):
    """A flattened tensor; every slice has a start and a stop."""

    def decode(self, chunk: slice) -> Tensor:
        """Its float32 values: the memory itself where that holds float32, else a new tensor."""

    def encode(self, chunk: slice, values: Tensor, step: int = 0) -> None:
        """Store what `decode` gave, changed; `values` is overwritten."""


class Plain(NamedTuple):
    """float32 as it is: decoding gives the memory, so that encoding has nothing to do."""

    values: Tensor

    def decode(self, chunk: slice) -> Tensor:
        return self.values[chunk]

    def encode(self, chunk: slice, values: Tensor, step: int = 0) -> None:
        pass


class Split(NamedTuple):
    """A float32 weight as bfloat16 and int16 halves, exact."""

    high: Tensor
    low: Tensor

    def decode(self, chunk: slice) -> Tensor:
        return join(self.high[chunk], self.low[chunk])

    def encode(self, chunk: slice, values: Tensor, step: int = 0) -> None:
        split(values, self.high[chunk], self.low[chunk])


class Rounded(NamedTuple):
    """bfloat16, rounded stochastically. The bits of element i are those of element `first` + i of
    the stream (seed, step, name): a shard draws what the whole tensor would."""

    values: Tensor
    seed: int
    name: str
    first: int = 0

    def decode(self, chunk: slice) -> Tensor:
        return self.values[chunk].float()

    def encode(self, chunk: slice, values: Tensor, step: int = 0) -> None:
        target = self.values[chunk]
        key = counter_key(self.seed, step, self.name)
        offset = self.first + chunk.start
        bits = counter_bits(key, target.numel(), offset=offset, device=target.device)
        round_stochastically(values, target, bits)


def master_storage(
    weight: Tensor, residual: Tensor | None, stream: tuple[int, str, int]
) -> Storage:
    """A master weight: float32; bfloat16 with its residual; or bfloat16 alone, drawn from `stream`
    (seed, canonical name, first element)."""
    flat = weight.view(-1)
    if residual is not None:
        return Split(flat, residual.view(-1))
    return Plain(flat) if flat.dtype == torch.float32 else Rounded(flat, *stream)
