"""Cross-entropy in chunks of tokens, with its gradient written by hand.

The full logits [B T, V] never exist: each chunk makes its logits, takes loss and gradients from
them at once, and lets them go (the forward pass keeps the gradients, not the logits).

Shapes: N tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

CHUNK_BYTES = 32 * 2**20  # of fp32 logits held at once


def chunk_tokens(num_tokens: int, vocab_size: int) -> int:
    """Tokens per chunk, so that its fp32 logits stay near CHUNK_BYTES."""
    return max(16, min(num_tokens, CHUNK_BYTES // (4 * vocab_size)))


@mx.custom_function
def summed_loss(
    hidden: mx.array, head: mx.array, labels: mx.array, token_weights: mx.array
) -> mx.array:
    """Sum over tokens of weight times negative log-likelihood, float32 scalar.

    hidden [N, C] in the compute dtype, head [V, C], labels int32 [N] (negative = no target),
    token_weights float32 [N].
    """
    total = mx.zeros((), mx.float32)
    size = chunk_tokens(hidden.shape[0], head.shape[0])
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        nll, _ = _chunk(hidden[part], head, labels[part])
        total = total + (nll * token_weights[part]).sum()
        # Chained, so that the evaluator does not hold the logits of several chunks.
        hidden = mx.depends([hidden], [total])[0]
    return total


def _chunk(hidden: mx.array, head: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    """(negative log-likelihood float32 [n], logits float32 [n, V]); 0 where there is no target."""
    scores = (hidden @ head.astype(hidden.dtype).T).astype(mx.float32)  # [n, V]
    valid = labels >= 0
    target = mx.take_along_axis(scores, mx.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    nll = mx.logsumexp(scores, axis=-1) - target
    return mx.where(valid, nll, 0.0), scores


@summed_loss.vjp
def _summed_loss_vjp(
    primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, ...]:
    hidden, head, labels, token_weights = primals
    size = chunk_tokens(hidden.shape[0], head.shape[0])
    head_gradient = mx.zeros(head.shape, mx.float32)
    hidden_gradients = []
    source = hidden
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        _, scores = _chunk(source[part], head, labels[part])
        weight = mx.where(labels[part] >= 0, token_weights[part], 0.0) * cotangent  # [n]
        index = mx.maximum(labels[part], 0)[:, None]
        gradient = mx.softmax(scores, axis=-1)  # [n, V]
        target = mx.take_along_axis(gradient, index, axis=-1) - 1.0
        gradient = mx.put_along_axis(gradient, index, target, axis=-1) * weight[:, None]
        gradient = gradient.astype(hidden.dtype)
        hidden_gradients.append(gradient @ head.astype(hidden.dtype))
        head_gradient = head_gradient + (gradient.T @ source[part]).astype(mx.float32)
        source = mx.depends([source], [head_gradient])[0]
    return (
        mx.concatenate(hidden_gradients),
        head_gradient.astype(head.dtype),
        mx.zeros_like(labels),
        mx.zeros_like(token_weights),
    )


def token_logprobs(hidden: mx.array, head: mx.array, labels: mx.array) -> mx.array:
    """float32 [N]: log p(label), 0 where there is no target."""
    size = chunk_tokens(hidden.shape[0], head.shape[0])
    parts = []
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        nll, _ = _chunk(hidden[part], head, labels[part])
        parts.append(-nll)
        hidden = mx.depends([hidden], [nll])[0]
    return mx.concatenate(parts)
