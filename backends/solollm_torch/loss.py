"""Cross-entropy over a large vocabulary, in chunks: the [B, T, V] logits never exist.

One chunk of positions at a time is multiplied with the head, turned into losses and, in training,
into its gradients at once. That makes the loss the end of the graph: the caller continues with
`hidden.backward(gradient)`. Everything about a chunk's logits is fp32.

Shapes: N positions with a target, C hidden size, V vocabulary, n positions of one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solollm.backend import IGNORED
from solollm_torch.kernels import Kernels
from solollm_torch.products import add_outer, product


class Targets(NamedTuple):
    """Which positions of a flattened [B, T] have a target, and what it is.

    `rows` int64 [N], None when all have one; `labels` int64 [N]; `weights` float32 [N], the factor
    of each target's loss, None for ones.
    """

    rows: Tensor | None
    labels: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, labels: np.ndarray, weights: np.ndarray | None, device: torch.device) -> Targets:
        """From int [B, T] (-100: no target) and float [B, T] or None, on the host."""
        flat = labels.reshape(-1)
        keep = np.flatnonzero(flat != IGNORED)
        factors = None
        if weights is not None:
            factors = torch.from_numpy(weights.reshape(-1)[keep].astype(np.float32)).to(device)
        chosen = torch.from_numpy(flat[keep].astype(np.int64)).to(device)
        rows = None if len(keep) == len(flat) else torch.from_numpy(keep).to(device)
        return cls(rows, chosen, factors)


def chunk_rows(vocab_size: int, device: torch.device, logit_bytes: int = 4) -> int:
    """Positions per chunk: logits of 256 MiB, on the CPU of 128 MiB and at most 256 positions.

    Fewer positions than 256 read a large head too often, more gain nothing.
    """
    most, budget = (256, 2**27) if device.type == "cpu" else (2**20, 2**28)
    return max(64, min(most, budget // (logit_bytes * vocab_size) // 64 * 64))


def _chunk_size(rows: Tensor, vocab_size: int, *, compiled: bool) -> int:
    """Of rows [N, C]. Compiled: logits stay in their dtype, and all chunks have one shape, as far
    as they can, since each other one is compiled for anew."""
    if not compiled:
        return chunk_rows(vocab_size, rows.device)
    count, size = len(rows), chunk_rows(vocab_size, rows.device, rows.itemsize)
    num_chunks = max(1, -(-count // size))
    return max(1, -(-count // num_chunks))


@torch.no_grad()
def loss_and_gradient(
    hidden: Tensor,
    head: Tensor,
    targets: Targets,
    denominator: float,
    *,
    kernels: Kernels | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of -log p(label) / denominator, and its gradient.

    Args:
        hidden: [..., C], the decoder's output.
        head: [V, C]; its gradient is added to `head.grad` (allocated, fp32) at once.
        compiled: a chunk's logits become their gradients in one compiled pass over them.

    Returns:
        The loss, fp32 0-dim, and its gradient with respect to `hidden`, of the same shape.
    """
    rows = hidden.detach().flatten(0, -2)  # [all, C]
    if targets.rows is not None:
        rows = rows[targets.rows]  # [N, C]
    weight = head.to(hidden.dtype)
    grad_rows = torch.empty_like(rows)
    total = torch.zeros((), device=hidden.device)
    scale = torch.full((len(rows), 1), 1 / denominator, device=hidden.device)  # [N, 1]
    if targets.weights is not None:
        scale *= targets.weights.unsqueeze(1)
    for part in _chunks(len(targets.labels), _chunk_size(rows, len(head), compiled=compiled)):
        chunk, labels, factors = rows[part], targets.labels[part], scale[part]  # [n, C], [n], [n,1]
        logits = product(chunk, weight)  # [n, V]
        if kernels is not None:
            nll = kernels.cross_entropy_(logits, labels, factors)  # [n]
            grad_rows[part] = product(logits, weight.t())
        else:
            if compiled:
                nll = _compiled()(logits, labels)  # [n]
            else:
                logits, nll = _gradient_and_nll(logits, labels)  # their gradient [n, V], [n]
            # The scale goes onto the smaller matrix.
            torch.mul(product(logits, weight.t()), factors, out=grad_rows[part])
            chunk = (chunk * factors).to(hidden.dtype)
        total += (nll if targets.weights is None else nll * targets.weights[part]).sum()
        if head.requires_grad:
            add_outer(head, logits, chunk)
    grad = grad_rows
    if targets.rows is not None:
        grad = hidden.new_zeros(hidden.shape[:-1].numel(), hidden.shape[-1])
        grad[targets.rows] = grad_rows
    return total / denominator, grad.view(hidden.shape)


@torch.no_grad()
def token_nll(hidden: Tensor, head: Tensor, targets: Targets) -> Tensor:
    """-log p(label) of every target in nats, float32 [N]; weights play no part."""
    rows = hidden.flatten(0, -2)
    if targets.rows is not None:
        rows = rows[targets.rows]
    weight = head.to(hidden.dtype)
    nll = torch.empty(len(targets.labels), device=hidden.device)
    for part in _chunks(len(nll), chunk_rows(len(head), hidden.device)):
        labels = targets.labels[part].unsqueeze(1)
        nll[part] = _softmax_and_nll(product(rows[part], weight), labels)[1]
    return nll


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _gradient_and_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """d nll / d logits = softmax - onehot(label) [n, V] in the dtype of the logits, and nll [n]."""
    probabilities, nll = _softmax_and_nll(logits, labels.unsqueeze(1))
    minus_one = probabilities.new_full((len(labels), 1), -1.0)
    probabilities.scatter_add_(1, labels.unsqueeze(1), minus_one)
    return probabilities.to(logits.dtype), nll


def _gradient_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """The same, overwriting the logits; gives nll alone.

    Written for the compiler: sums over a row and nothing that is looked up in it or used twice, so
    that one kernel reads the row for them and, while the caches have it, once more to overwrite it.
    The single operations of `_gradient_and_nll` pass over memory some eight times.
    """
    wide = logits.float()
    top = wide.amax(dim=1, keepdim=True)  # [n, 1]
    log_sum = top + (wide - top).exp().sum(dim=1, keepdim=True).log()
    is_label = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
    chosen = torch.where(is_label, wide, 0.0).sum(dim=1)
    logits.copy_((wide - log_sum).exp() - is_label.float())
    return log_sum.squeeze(1) - chosen


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_gradient_in_place, fullgraph=True)


def _softmax_and_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """softmax fp32 [n, V], in the memory of fp32 logits, and -log p(label) [n].

    The largest probability is 1 / sum(exp(logit - max)), so the log of the sum costs one more
    reading pass instead of a second exponential of every logit.
    """
    logits = logits.float()
    top = logits.amax(dim=1)  # [n]
    chosen = logits.gather(1, labels).squeeze(1)  # [n]
    torch.softmax(logits, dim=1, out=logits)
    return logits, top - chosen - logits.amax(dim=1).log()
