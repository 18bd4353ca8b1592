"""Causal attention within documents, in blocks of queries.

Metal has no fused attention backward, so a plain call keeps B x H x T x T probabilities per layer
for the backward pass. In blocks of queries, each recomputed in backward, only one block's
probabilities live at a time; a block also skips the keys after its last query, which halves the
work of a causal row.

Shapes: B rows, T positions, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from solollm_mlx.exponential import MASKED, softmax

BLOCK = 128  # queries per block; rows no longer than one are taken whole


def attend(q: mx.array, k: mx.array, v: mx.array, segments: mx.array | None) -> mx.array:
    """softmax(q k^T / sqrt(D)) v, causal and within documents.

    q is [B, H, T, D], k and v are [B, K, T, D]; segments int [B, T] or None. Gives [B, H, T, D].
    """
    length = q.shape[2]
    if length <= BLOCK:
        return attend_block(q, k, v, segments=segments, start=0)
    parts = []
    for start in range(0, length, BLOCK):
        stop = min(length, start + BLOCK)
        own = None if segments is None else segments[:, :stop]
        # Bound now, not when called: mx.checkpoint runs the function again in backward. Segments
        # are integers, which it cannot take as arguments.
        part = mx.checkpoint(partial(attend_block, segments=own, start=start))
        parts.append(part(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]))
    return mx.concatenate(parts, axis=2)


def attend_block(
    q: mx.array, k: mx.array, v: mx.array, *, segments: mx.array | None, start: int
) -> mx.array:
    """Queries at positions `start` onwards against the keys at 0 onwards."""
    scale, rows, keys = q.shape[-1] ** -0.5, q.shape[2], k.shape[2]
    mask = mx.arange(start, start + rows)[:, None] >= mx.arange(keys)[None]  # [t, T]
    if segments is not None:
        same = segments[:, start : start + rows, None] == segments[:, None, :]  # [B, t, T]
        mask = mx.expand_dims(mx.logical_and(mask, same), 1)  # [B, 1, t, T]
    if mx.default_device().type == mx.DeviceType.gpu or q.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    return _on_processor(q * scale, k, v, mask)


def _on_processor(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """The same with a softmax that is faster there; q is scaled, mask bool [t, T] or
    [B, 1, t, T]."""
    shared = q.shape[1] // k.shape[1]  # query heads per key head
    grouped = q.reshape(q.shape[0], k.shape[1], shared, *q.shape[2:])  # [B, K, H/K, t, D]
    scores = grouped @ mx.expand_dims(k, 2).swapaxes(-1, -2)  # [B, K, H/K, t, T]
    # Added, not chosen: a sum has nothing to do in backward.
    bias = mx.where(mask, 0.0, MASKED)
    scores = scores + (bias if bias.ndim == 2 else mx.expand_dims(bias, 1))
    return (softmax(scores) @ mx.expand_dims(v, 2)).reshape(q.shape)  # [B, H, t, D]
