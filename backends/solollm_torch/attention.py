"""Causal attention, whole rows or document by document.

Packed rows hold several documents; attention stays within each. `Segments` is made once per
micro-batch from `segment_ids`, `attend` is called once per layer.

Shapes: B rows, T positions, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Document(NamedTuple):
    """Positions `start` to `stop` (exclusive) of `row` belong together."""

    row: int
    start: int
    stop: int


class Segments(NamedTuple):
    """The documents of a micro-batch, in row and position order; together they cover it."""

    documents: tuple[Document, ...]

    @classmethod
    def of(cls, segment_ids: np.ndarray) -> Segments | None:
        """From int [B, T], equal ids contiguous; None when every row is one document."""
        num_rows, length = segment_ids.shape
        borders = segment_ids[:, 1:] != segment_ids[:, :-1]  # [B, T - 1]
        if not borders.any():
            return None
        documents = []
        for row in range(num_rows):
            cuts = [0, *(np.flatnonzero(borders[row]) + 1).tolist(), length]
            documents += [Document(row, a, b) for a, b in itertools.pairwise(cuts)]
        return cls(tuple(documents))


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, causal and within documents.

    q is [B, H, T, D]; k and v are [B, K, T, D] with K dividing H. Returns [B, H, T, D].
    """
    grouped = q.shape[1] != k.shape[1]
    if segments is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    rows: list[list[Tensor]] = [[] for _ in range(q.shape[0])]
    for row, start, stop in segments.documents:
        part = (slice(row, row + 1), slice(None), slice(start, stop))
        rows[row].append(
            scaled_dot_product_attention(
                q[part], k[part], v[part], is_causal=True, enable_gqa=grouped
            )
        )
    return torch.cat([torch.cat(row, dim=2) for row in rows])
