"""Cross-entropy in chunks of tokens, with its gradient written by hand.

The full logits [N, V] never exist: each chunk makes its logits, turns them into losses and into
gradients at once, and lets them go. What the forward pass keeps is the gradients.

Shapes: N tokens, n tokens of one chunk, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from solollm_mlx.exponential import exp_of_negative, log_sum_exp

CHUNK_BYTES = 32 * 2**20  # of fp32 logits held at once
CHUNK_TOKENS = 256  # more gain no speed, and cost memory


def chunk_tokens(num_tokens: int, vocab_size: int) -> int:
    """Tokens per chunk: few enough that its fp32 logits stay near CHUNK_BYTES."""
    return max(16, min(num_tokens, CHUNK_TOKENS, CHUNK_BYTES // (4 * vocab_size)))


def frozen_chunk_tokens(num_tokens: int, vocab_size: int) -> int:
    """The same under a frozen head: half as many. A short chunk costs little there, since it adds
    nothing up over [V, C]."""
    return max(16, chunk_tokens(num_tokens, vocab_size) // 2)


def summed_loss(
    hidden: mx.array, head: mx.array, labels: mx.array, token_weights: mx.array
) -> mx.array:
    """Sum over tokens of weight times negative log-likelihood, float32 scalar.

    hidden [N, C] in the compute dtype, head fp32 [V, C], labels int32 [N] (negative = no target),
    token_weights float32 [N]. Gradients in fp16 are made at the size that the weights give them:
    a loss scale belongs into the weights.
    """
    outputs: Any = _loss_and_gradients(hidden, head, labels, token_weights)
    total: mx.array = outputs[0]
    return total


@mx.custom_function
def _loss_and_gradients(
    hidden: mx.array, head: mx.array, labels: mx.array, token_weights: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """(loss, its gradient by hidden, its gradient by head)."""
    total = mx.zeros((), mx.float32)
    head_gradient = mx.zeros(head.shape, mx.float32)
    weight = head.astype(hidden.dtype)
    rows, parts = hidden, []
    size = chunk_tokens(hidden.shape[0], head.shape[0])
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        of_part, gradient = _chunk_gradient(rows[part], weight, labels[part], token_weights[part])
        total = total + of_part
        parts.append(gradient @ weight)  # [n, C]
        head_gradient = head_gradient + (gradient.T @ rows[part]).astype(mx.float32)
        # Chained, so that the evaluator does not hold the logits of several chunks.
        rows = mx.depends([rows], [head_gradient, parts[-1]])[0]
    return total, mx.concatenate(parts), head_gradient


@_loss_and_gradients.vjp
def _loss_and_gradients_vjp(
    primals: tuple[mx.array, ...],
    cotangents: tuple[mx.array, ...],
    outputs: tuple[mx.array, ...],
) -> tuple[mx.array, ...]:
    _, head, labels, token_weights = primals
    _, hidden_gradient, head_gradient = outputs
    scale = cotangents[0]
    return (
        hidden_gradient * scale.astype(hidden_gradient.dtype),
        (head_gradient * scale).astype(head.dtype),
        mx.zeros_like(labels),
        mx.zeros_like(token_weights),
    )


def summed_loss_under(
    hidden: mx.array, head: mx.array, labels: mx.array, token_weights: mx.array
) -> mx.array:
    """`summed_loss` under a frozen head, in whatever dtype: its gradient is not made."""
    outputs: Any = _loss_and_hidden_gradient(hidden, head, labels, token_weights)
    total: mx.array = outputs[0]
    return total


@mx.custom_function
def _loss_and_hidden_gradient(
    hidden: mx.array, head: mx.array, labels: mx.array, token_weights: mx.array
) -> tuple[mx.array, mx.array]:
    """(loss, its gradient by hidden)."""
    total = mx.zeros((), mx.float32)
    weight = head.astype(hidden.dtype)
    rows, parts = hidden, []
    size = frozen_chunk_tokens(hidden.shape[0], head.shape[0])
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        of_part, gradient = _chunk_gradient(rows[part], weight, labels[part], token_weights[part])
        total = total + of_part
        parts.append(gradient @ weight)  # [n, C]
        rows = mx.depends([rows], [total, parts[-1]])[0]  # chained, as above
    return total, mx.concatenate(parts)


@_loss_and_hidden_gradient.vjp
def _loss_and_hidden_gradient_vjp(
    primals: tuple[mx.array, ...],
    cotangents: tuple[mx.array, ...],
    outputs: tuple[mx.array, ...],
) -> tuple[mx.array, ...]:
    _, head, labels, token_weights = primals
    hidden_gradient = outputs[1]
    scale = cotangents[0].astype(hidden_gradient.dtype)
    nothing = (mx.zeros_like(array) for array in (head, labels, token_weights))
    return hidden_gradient * scale, *nothing


def _chunk_gradient(
    rows: mx.array, weight: mx.array, labels: mx.array, token_weights: mx.array
) -> tuple[mx.array, mx.array]:
    """(summed loss of n tokens, its gradient by their logits [n, V] in the compute dtype)."""
    nll, logits, log_sum = _chunk(rows, weight, labels)
    factor = mx.where(labels >= 0, token_weights, 0.0)[:, None]  # [n, 1]
    # d nll / d logits = probabilities - onehot(label)
    onehot = mx.arange(weight.shape[0]) == labels[:, None]  # [n, V]
    gradient = (exp_of_negative(logits - log_sum[:, None]) - onehot) * factor
    return (nll * token_weights).sum(), gradient.astype(rows.dtype)


def token_logprobs(hidden: mx.array, head: mx.array, labels: mx.array) -> mx.array:
    """float32 [N]: log p(label), 0 where there is no target."""
    weight, parts = head.astype(hidden.dtype), []
    size = chunk_tokens(hidden.shape[0], head.shape[0])
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        parts.append(-_chunk(hidden[part], weight, labels[part])[0])
        hidden = mx.depends([hidden], [parts[-1]])[0]
    return mx.concatenate(parts)


def _chunk(
    hidden: mx.array, weight: mx.array, labels: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Of n tokens, in float32: negative log-likelihood [n], 0 where there is no target; logits
    [n, V]; the log of their summed exponentials [n]."""
    logits = (hidden @ weight.T).astype(mx.float32)  # [n, V]
    log_sum = log_sum_exp(logits)  # [n]
    target = mx.take_along_axis(logits, mx.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return mx.where(labels >= 0, log_sum - target, 0.0), logits, log_sum
