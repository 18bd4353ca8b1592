"""Attention within packed documents by kernels that only cards have: flash over packed lengths, and
FlexAttention over a block mask. `attention` calls them. A card trains with the first where
`varlen_agrees`: a 1.3B takes a sixth longer with a mask (docs/results/gpu.md).

Shapes: B rows, T positions, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from solollm.errors import BackendError

_MOST_DEVIATION = 0.05  # of the largest number; bf16 rounds by 0.004, a wrong border gives about 1


@functools.cache
def varlen_agrees(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel over packed lengths is there for such numbers and gives, forward and
    backward, what a mask gives. It is asked once, with a few documents of drawn numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, up = (
        torch.randn(2, 2, 64, head_dim, generator=generator).to(device, dtype) for _ in range(4)
    )
    borders = torch.tensor([0, 20, 64, 128], dtype=torch.int32, device=device)
    ids = (torch.arange(128, device=device) >= 20).view(2, 64)
    mask = (ids.unsqueeze(1) == ids.unsqueeze(2)).tril().unsqueeze(1)
    found = []
    try:
        for packed in (True, False):
            a, b, c = inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            with torch.enable_grad():
                if packed:
                    attended = varlen_attention(a, b, c, borders)
                else:
                    attended = scaled_dot_product_attention(a, b, c, attn_mask=mask)
            found.append([attended, *torch.autograd.grad(attended, inputs, up)])
    except (ImportError, RuntimeError):  # no such kernel in this build, or not for this card
        return False
    return all(
        bool((ours - theirs).abs().max() <= _MOST_DEVIATION * theirs.abs().max())
        for ours, theirs in zip(*found, strict=True)
    )


def require_varlen(device: torch.device) -> None:
    """Raise BackendError where `attention = varlen` cannot run."""
    if device.type != "cuda":
        raise _only_on_cards("varlen", "the kernel over packed lengths")
    try:
        import torch.nn.attention.varlen
    except ImportError as error:
        raise BackendError(
            f"attention = varlen is not in torch {torch.__version__}",
            why=str(error),
            fix="take attention = flex, or leave the option out",
        ) from error


def require_flex(device: torch.device) -> None:
    """Raise BackendError where `attention = flex` cannot train."""
    if device.type != "cuda":
        raise _only_on_cards("flex", "FlexAttention's backward pass")


def _only_on_cards(way: str, what: str) -> BackendError:
    return BackendError(
        f"attention = {way} runs on NVIDIA cards only",
        why=f"PyTorch has {what} for CUDA and not for the CPU",
        fix="leave the option `attention` out",
    )


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, causal and within documents: [B, H, T, D].

    `borders`: int32 [documents + 1], where each begins in the flattened [B T], then B T. No
    document crosses a row, so T bounds their lengths, and does so without asking the device.
    """
    from torch.nn.attention import varlen

    kernel: Any = varlen.varlen_attn  # its keywords differ between versions
    rows, heads, length, dim = q.shape
    if k.shape[1] != heads:
        groups = heads // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    flat = [x.transpose(1, 2).reshape(rows * length, heads, dim) for x in (q, k, v)]
    attended: Tensor = kernel(*flat, borders, borders, length, length, **_causal(kernel))
    return attended.view(rows, length, heads, dim).transpose(1, 2)


def _causal(varlen_attn: Any) -> dict[str, Any]:
    """The keyword changed its name between torch 2.11 and 2.13."""
    known = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}


def block_mask(ids: Tensor) -> Any:
    """FlexAttention's mask of int [B, T]: causal, within equal ids."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[row, query] == ids[row, key])

    rows, length = ids.shape
    return create_block_mask(allowed, rows, None, length, length, device=str(ids.device))


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
    """The same over a block mask: [B, H, T, D]."""
    grouped = q.shape[1] != k.shape[1]
    function = _flex_attention(compiled=q.device.type == "cuda" and not _compiling())
    attended: Tensor = function(q, k, v, block_mask=blocks, enable_gqa=grouped)
    return attended


def _compiling() -> bool:
    return torch.compiler.is_compiling()


@functools.cache
def _flex_attention(*, compiled: bool) -> Any:
    """Uncompiled it computes all scores: right, and far too slow to train with."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
