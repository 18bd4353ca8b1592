"""The cross-entropy of other packages in place of `loss.loss_and_gradient`, behind one signature.

`liger`: Liger-Kernel's fused linear cross-entropy (Triton). `cce`: Apple's cut-cross-entropy. Both
run on CUDA only, and are options until a card has shown that they gain. Targets with weights go to
our own loss: neither package is given a factor per target here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from solollm.errors import BackendError, ConfigError
from solollm_torch.kernels import Kernels
from solollm_torch.loss import Targets, loss_and_gradient

PACKAGES = {
    "liger": ("liger_kernel", "liger-kernel"),
    "cce": ("cut_cross_entropy", "cut-cross-entropy"),
}


class LossAndGradient(Protocol):
    """See `loss.loss_and_gradient`."""

    def __call__(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Targets,
        denominator: float,
        *,
        kernels: Kernels | None = None,
    ) -> tuple[Tensor, Tensor]: ...


def choose_loss(name: str, device: torch.device, *, compiled: bool) -> LossAndGradient:
    """The loss of the option `loss`: own (`compiled` as the blocks are), liger or cce.

    Raises:
        ConfigError: no such loss. BackendError: its package, or its device, is not here.
    """
    if name == "own":
        return partial(loss_and_gradient, compiled=compiled)
    if name not in PACKAGES:
        raise ConfigError(f"loss = {name!r} is not a choice", fix="use own, liger or cce")
    module, package = PACKAGES[name]
    if find_spec(module) is None:
        raise BackendError(
            f"loss = {name} needs a package that is not installed",
            why=f"there is no module `{module}`",
            fix=f"pip install {package}, or leave the option `loss` out",
        )
    if device.type != "cuda":
        raise BackendError(
            f"loss = {name} runs on NVIDIA cards only",
            why="its kernels are written in Triton",
            fix="leave the option `loss` out",
        )
    return _with(_liger_sum if name == "liger" else _cce_sum)


def _with(summed: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LossAndGradient:
    """Our signature around a function of (rows [N, C], head [V, C], labels [N]) that gives the
    summed loss under autograd."""

    def loss(
        hidden: Tensor,
        head: Tensor,
        targets: Targets,
        denominator: float,
        *,
        kernels: Kernels | None = None,
    ) -> tuple[Tensor, Tensor]:
        if targets.weights is not None:
            return loss_and_gradient(hidden, head, targets, denominator, kernels=kernels)
        with torch.enable_grad():
            rows = hidden.detach().flatten(0, -2).requires_grad_()
            chosen = rows if targets.rows is None else rows[targets.rows]
            total = summed(chosen, head.to(hidden.dtype), targets.labels) / denominator
            total.backward()  # type: ignore[no-untyped-call]
        assert rows.grad is not None, "the loss depends on its input"
        return total.detach().float(), rows.grad.view(hidden.shape)

    return loss


def _liger_sum(rows: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Any = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    summed: Tensor = loss(head, rows, labels)
    return summed


def _cce_sum(rows: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # Its filter of small gradients is meant for fine-tuning: off while a model is pretrained.
    summed: Tensor = linear_cross_entropy(rows, head, labels, reduction="sum", filter_eps=None)
    return summed
