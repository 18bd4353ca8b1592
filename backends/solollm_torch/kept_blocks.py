"""What a block leaves for its backward pass, where blocks are computed one by one.

Recomputed blocks leave their input and are computed again; the others leave their graph, with all
of their activations. Either way the arithmetic is that of one graph over all blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from solollm_torch.residuals import Residuals

Compute = Callable[[Tensor], Tensor]


class KeptBlocks:
    """Blocks go forward from 0 to the last, and backward to 0."""

    def __init__(self, residuals: Residuals, *, recomputes: bool) -> None:
        self._residuals, self._recomputes = residuals, recomputes
        self._graphs: list[tuple[Tensor, Tensor]] = []
        self._shape = torch.Size()

    def host_bytes(self) -> int:
        """Of the buffers on the host."""
        return self._residuals.host_bytes()

    def forward(self, index: int, x: Tensor, compute: Compute) -> Tensor:
        """[M, T, C] to [M, T, C], without a graph to what came before."""
        self._shape = x.shape
        if self._recomputes:
            self._residuals.keep(index, x)
            # Not `no_grad`: that takes the formulas of inference, which round otherwise than those
            # that the backward pass computes again.
            with saved_tensors_hooks(_forget, _never):
                return compute(x).detach()
        x = x.detach().requires_grad_()
        y = compute(x)
        self._graphs.append((x, y))
        return y.detach()

    def backward(self, index: int, gradient: Tensor, compute: Compute) -> Tensor:
        """The gradient of the block's input, from that of its output; those of its weights are
        added to where they are attached."""
        if self._recomputes:
            self._residuals.prefetch(index - 1, self._shape)
            x = self._residuals.take(index, self._shape).detach().requires_grad_()
            y = compute(x)
        else:
            x, y = self._graphs.pop()
        torch.autograd.backward(y, gradient)
        if self._recomputes:
            self._residuals.done(index)
        assert x.grad is not None, "a block's output depends on its input"
        return x.grad


def _forget(saved: Tensor) -> None:
    """What a graph would keep, where the graph is thrown away."""


def _never(saved: None) -> Tensor:
    raise AssertionError("a recomputed block's first graph has no backward pass")
