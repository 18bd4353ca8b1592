"""Frozen weights in 4 bits: bitsandbytes' NF4 with double quantisation, the same on CPU and CUDA.

A block of 64 neighbours shares one largest magnitude; the codes are 16 levels of a normal
distribution, and the magnitudes themselves are stored in 8 bits in blocks of 256 (QLoRA, Dettmers
et al. 2023, arXiv:2305.14314): 4.13 bits per weight. The codec in NumPy, which an export uses
where no torch is, is `solollm.nf4_codec`; what is computed with such weights is in `adapter`.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from solollm.errors import BackendError
from solollm.nf4_codec import BLOCK_SIZE, MAGNITUDE_BLOCK_SIZE, dynamic_levels
from solollm_torch.kernels import Kernels


class Nf4Matrix:
    """One canonical matrix [out, in] in codes."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: what it is decoded to."""
        require_bitsandbytes()
        self.shape = shape
        self._device, self._dtype = device, dtype
        self._codes: Tensor | None = None
        self._state: Any = None  # bitsandbytes has no types

    def encode(self, weight: Tensor) -> None:
        """Quantise `weight`, of any float dtype; it is widened to fp32 first, so that the codes do
        not depend on where it comes from."""
        from bitsandbytes.functional import QuantState, quantize_4bit

        make_state: Any = QuantState

        wide = weight.to(self._device, torch.float32).contiguous()
        self._codes, state = quantize_4bit(wide, blocksize=BLOCK_SIZE, quant_type="nf4")
        mean = (state.absmax.double().sum() / state.absmax.numel()).float()
        magnitudes, largest = _nearest_levels(state.absmax - mean)
        levels = _levels().to(self._device)
        self._state = make_state(
            absmax=magnitudes, shape=state.shape, code=state.code, blocksize=BLOCK_SIZE,
            quant_type="nf4", dtype=self._dtype, offset=mean,
            state2=make_state(
                absmax=largest, code=levels, blocksize=MAGNITUDE_BLOCK_SIZE, dtype=torch.float32
            ),
        )  # fmt: skip

    def decode_into(self, out: Tensor, kernels: Kernels | None = None) -> None:
        """Write the weights into `out`, [out, in], contiguous, of the dtype given at the start;
        the same bits with compiled loops and without."""
        from bitsandbytes.functional import dequantize_4bit

        assert self._codes is not None, "a base is imported before it is used"
        if out.device.type != "cpu":
            dequantize_4bit(self._codes, self._state, out=out)
        elif out.dtype == torch.float32 and out.numel() % BLOCK_SIZE == 0:
            self._decode_pairs(self._codes, out, kernels)
        else:  # bitsandbytes writes into given memory on CUDA only
            out.copy_(dequantize_4bit(self._codes, self._state))

    def _decode_pairs(self, codes: Tensor, out: Tensor, kernels: Kernels | None) -> None:
        """The same bits on the CPU: one look-up gives the two weights of a byte, in place."""
        from bitsandbytes.functional import dequantize_blockwise

        state = self._state
        scales = dequantize_blockwise(state.absmax, state.state2).add_(state.offset)
        pairs = _pairs(tuple(state.code.tolist()))
        if kernels is not None:
            kernels.decode_nf4(codes, pairs, scales, out)
            return
        bits = out.view(-1).view(torch.int64)
        torch.index_select(pairs, 0, codes.view(-1).int(), out=bits)
        out.view(-1, BLOCK_SIZE).mul_(scales[:, None])

    @property
    def num_bytes(self) -> int:
        """Of codes and statistics."""
        if self._codes is None:
            return 0
        state = self._state
        tensors = (self._codes, state.absmax, state.state2.absmax)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _nearest_levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [n]: the nearest of 256 levels for each of [n] values, in blocks; float32: the largest
    of each block. The same bits on every device, which bitsandbytes' own kernels do not give."""
    size = MAGNITUDE_BLOCK_SIZE
    padded = values.new_zeros(-(-len(values) // size) * size)
    padded[: len(values)] = values
    blocks = padded.view(-1, size)
    largest = blocks.abs().amax(dim=1)
    levels = _levels().to(values.device)
    borders = (levels[1:] + levels[:-1]) / 2
    scaled = blocks / torch.where(largest > 0, largest, 1.0)[:, None]
    codes = torch.searchsorted(borders, scaled).to(torch.uint8)
    return codes.view(-1)[: len(values)].contiguous(), largest


@cache
def _levels() -> Tensor:
    return torch.from_numpy(dynamic_levels().copy())


@cache
def _pairs(levels: tuple[float, ...]) -> Tensor:
    """int64 [256]: for every byte the bits of the two fp32 levels that its halves stand for."""
    values = torch.tensor(levels)
    both = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)  # [256, 2]
    return both.view(torch.int64).view(-1)


def require_bitsandbytes() -> None:
    """Raise BackendError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise BackendError(
            "QLoRA on PyTorch needs bitsandbytes, which is not installed",
            why="the frozen base is held in its NF4 codes",
            fix="pip install 'solollm[qlora]', or use --method lora",
        )
