"""The 8-bit optimizer-state codec of `solollm.optim_codec` in torch, equal to it bit for bit."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from solollm.optim_codec import BLOCK_SIZE, State, codebook, search_table


class Tables(NamedTuple):
    """By which values become codes and codes values, on a device."""

    levels: Tensor  # float32 [256]
    borders: Tensor  # float32 [256], the last one infinite
    low: Tensor  # int32 [65536], see `search_table`


@cache
def tables_of(state: State, device: torch.device) -> Tables:
    book = codebook(state)
    borders = torch.full((256,), torch.inf)
    borders[:-1] = torch.from_numpy(book.borders.copy())
    levels, low = torch.from_numpy(book.levels.copy()), torch.from_numpy(search_table(state).copy())
    return Tables(levels.to(device), borders.to(device), low.to(device))


class CodedState(NamedTuple):
    """One quantised state: codes, uint8 [numel], and absmax, float32 [num_blocks]; both are the
    stored memory itself. Slices begin at a multiple of the block size."""

    state: State
    codes: Tensor
    absmax: Tensor

    def decode(self, chunk: slice) -> Tensor:
        """The float32 values of a slice, a new tensor."""
        codes = self.codes[chunk]
        tables = tables_of(self.state, codes.device)
        values = tables.levels.index_select(0, codes.int())
        _scale(values, self.absmax[_blocks(chunk, codes.numel())])
        return values

    def encode(self, chunk: slice, values: Tensor, step: int = 0) -> None:
        """Store the float32 values of a slice; `values` is overwritten, `step` plays no part."""
        codes = self.codes[chunk]
        tables = tables_of(self.state, codes.device)
        full = values.numel() - values.numel() % BLOCK_SIZE
        largest = [values[:full].view(-1, BLOCK_SIZE).abs().amax(dim=1)]
        if full < values.numel():
            largest.append(values[full:].abs().amax().view(1))
        absmax = torch.cat(largest)
        self.absmax[_blocks(chunk, codes.numel())] = absmax
        _scale(values, torch.where(absmax > 0, absmax, 1.0), divide=True)
        upper = (values.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        low = tables.low.index_select(0, upper)
        codes.copy_(low.add_(values > tables.borders.index_select(0, low)))


def _blocks(chunk: slice, count: int) -> slice:
    first = chunk.start // BLOCK_SIZE
    return slice(first, first - (-count // BLOCK_SIZE))


def _scale(values: Tensor, absmax: Tensor, *, divide: bool = False) -> None:
    full = values.numel() - values.numel() % BLOCK_SIZE
    apply = torch.Tensor.div_ if divide else torch.Tensor.mul_
    apply(values[:full].view(-1, BLOCK_SIZE), absmax[: full // BLOCK_SIZE, None])
    if full < values.numel():
        apply(values[full:], absmax[-1])
