"""Causal attention, over whole rows or within packed documents.

Packed rows hold several documents and attention stays within each. `Segments` is made once per
micro-batch from `segment_ids`; `attend` is called once per layer. On the CPU every document is
attended to on its own, so that no masked product is computed; elsewhere, and under the compiler
(which would trace a loop over documents anew for every batch), one boolean mask serves all rows.
Two more ways are switches for cards: the flash kernel over packed lengths, and FlexAttention.

Shapes: B rows, T positions, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from solollm_torch.kernels import Kernels, Places, Turns
from solollm_torch.ops import Rotary
from solollm_torch.packed_attention import block_mask, flex, varlen_attention


class Document(NamedTuple):
    """Positions `start` to `stop` of each row from `first_row` to `last_row` (both exclusive at
    the end): one document, or equally placed documents of neighbouring rows."""

    first_row: int
    last_row: int
    start: int
    stop: int

    def of(self, x: Tensor) -> Tensor:
        """Its part of [B, heads, T, ...]."""
        return x[self.first_row : self.last_row, :, self.start : self.stop]


Way = Literal["documents", "mask", "varlen", "flex"]
WAYS: tuple[Way, ...] = ("documents", "mask", "varlen", "flex")


class Segments(NamedTuple):
    """The documents of a micro-batch, which cover it without overlap, in one of four forms."""

    documents: tuple[Document, ...] = ()
    mask: Tensor | None = None  # bool [B, 1, T, T], True where attention is allowed
    borders: Tensor | None = (
        None  # int32: where documents begin in the flattened [B T], and its end
    )
    blocks: Any = None  # FlexAttention's block mask

    @classmethod
    def of(
        cls, segment_ids: np.ndarray, device: torch.device, *, way: Way = "documents"
    ) -> Segments | None:
        """From int [B, T], equal ids contiguous; None when every row is one document."""
        borders = segment_ids[:, 1:] != segment_ids[:, :-1]  # [B, T - 1]
        if not borders.any():
            return None
        if way == "documents":
            return cls(tuple(_documents(borders)))
        if way == "varlen":
            return cls(borders=torch.from_numpy(_starts(borders)).to(device))
        ids = torch.from_numpy(np.ascontiguousarray(segment_ids)).to(device)
        if way == "flex":
            return cls(blocks=block_mask(ids))
        same = ids.unsqueeze(1) == ids.unsqueeze(2)  # [B, T, T]
        return cls(mask=same.tril().unsqueeze(1))


def _documents(borders: np.ndarray) -> list[Document]:
    documents: list[Document] = []
    length = borders.shape[1] + 1
    for row, border in enumerate(borders):
        cuts = [0, *(np.flatnonzero(border) + 1).tolist(), length]
        for start, stop in itertools.pairwise(cuts):
            last = documents[-1] if documents else None
            if last is not None and last[1:] == (row, start, stop):
                documents[-1] = last._replace(last_row=row + 1)
            else:
                documents.append(Document(row, row + 1, start, stop))
    return documents


def _starts(borders: np.ndarray) -> np.ndarray:
    """int32 [documents + 1]: the first position of each in the flattened [B T], then B T."""
    rows, length = borders.shape[0], borders.shape[1] + 1
    begins = np.ones((rows, length), bool)
    begins[:, 1:] = borders
    return np.append(np.flatnonzero(begins), rows * length).astype(np.int32)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, causal and within documents.

    q is [B, H, T, D]; k and v are [B, K, T, D] with K dividing H. Returns [B, H, T, D].
    """
    grouped = q.shape[1] != k.shape[1]
    if segments is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if segments.borders is not None:
        return varlen_attention(q, k, v, segments.borders)
    if segments.blocks is not None:
        return flex(q, k, v, segments.blocks)
    if segments.mask is not None:
        return scaled_dot_product_attention(q, k, v, attn_mask=segments.mask, enable_gqa=grouped)
    if grouped:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    attended: Tensor = _PerDocument.apply(q, k, v, segments.documents)  # type: ignore[no-untyped-call]
    return attended


def attend_fused(
    qkv: Tensor, num_heads: int, rotary: Rotary, segments: Segments | None, *, kernels: Kernels
) -> Tensor:
    """Rotation and attention of qkv [B, T, H + 2 K, D] at once: [B, T, H, D].

    No mask: `segments` holds documents.
    """
    rows, length = qkv.shape[:2]
    if segments is None:
        documents = [(row * length, length) for row in range(rows)]
    else:
        documents = [
            (row * length + start, stop - start)
            for first, last, start, stop in segments.documents
            for row in range(first, last)
        ]
    longest = max(size for _, size in documents)
    places = Places(torch.tensor(documents), longest)
    turns = Turns(rotary.cos.contiguous(), rotary.sin.contiguous(), places)
    attended: Tensor = _Fused.apply(qkv, num_heads, turns, kernels)  # type: ignore[no-untyped-call]
    return attended


class _Fused(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, turns: Turns, kernels: Kernels) -> Tensor:
        out, log_sum = kernels.attention(qkv, num_heads, turns)
        ctx.save_for_backward(qkv, log_sum)
        ctx.turns, ctx.kernels = turns, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad_qkv = ctx.kernels.attention_backward(grad, *ctx.saved_tensors, ctx.turns)
        return grad_qkv, None, None, None


class _PerDocument(Function):
    """A loop of the CPU's flash kernel over documents, each result written to its place.

    Written by hand because slicing under autograd would fill a zero tensor of the full size per
    document and layer. The two operators are what `scaled_dot_product_attention` calls on the CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: tuple[Document, ...]
    ) -> Tensor:
        rows, heads, length, dim = q.shape
        # Laid out [B, T, H, D] in memory, so that merging the heads later is no copy.
        out = q.new_empty(rows, length, heads, dim).transpose(1, 2)
        ctx.documents, log_sums = documents, []
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for document in documents:
            part, log_sum = flash(document.of(q), document.of(k), document.of(v), 0.0, True)
            document.of(out).copy_(part)
            log_sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *log_sums = ctx.saved_tensors
        inputs = (q, k, v)
        rows, heads, length, dim = q.shape
        grads = [q.new_empty(rows, length, heads, dim).transpose(1, 2) for _ in inputs]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for document, log_sum in zip(ctx.documents, log_sums, strict=True):
            q, k, v = (document.of(x) for x in inputs)
            parts = flash(document.of(grad), q, k, v, document.of(out), log_sum, 0.0, True)
            for whole, part in zip(grads, parts, strict=True):
                document.of(whole).copy_(part)
        return grads[0], grads[1], grads[2], None
