"""Attention within packed documents by kernels that only cards have: flash over packed lengths, and
FlexAttention over a block mask. `attention` calls them; both are switches, off until measured.

Shapes: B rows, T positions, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from solollm.errors import BackendError


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
