"""DPO and GRPO on PyTorch: the cross-entropy's two passes over the head, with slopes as weights.

The first pass gives log p of every target; of these come the loss and its slope by each of them,
as in `solollm.preference`, which has the formulas. The second is the cross-entropy's own, each
target weighted with its slope: its gradient is the objective's. So [B, T, V] never exists here
either, and the head is multiplied once more than in plain training.

Shapes: M rows of a micro-batch, T positions, N targets, P pairs, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from solollm.backend import Batch, Objective, SessionOptions
from solollm.preference import require_fields
from solollm_torch.kernels import Kernels
from solollm_torch.loss import Targets, loss_and_gradient, token_nll


class Preference(NamedTuple):
    """The objective of a session and its numbers."""

    objective: Objective
    beta: float
    label_smoothing: float

    @classmethod
    def of(cls, options: SessionOptions) -> Preference | None:
        """None: plain cross-entropy."""
        if options.objective == "lm":
            return None
        return cls(options.objective, options.beta, options.label_smoothing)

    def loss_and_gradient(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Targets,
        *,
        batch: Batch,
        rows: slice,
        kernels: Kernels | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `loss.loss_and_gradient` gives, of these rows of the batch; hidden [M, T, C]."""
        require_fields(batch, self.objective, self.beta)
        terms = _Terms.of(batch, rows, targets, hidden.device)
        logprobs = terms.spread(-token_nll(hidden, head, targets))
        if self.objective == "dpo":
            loss, slopes = self._dpo(logprobs, terms)
        else:
            loss, slopes = self._grpo(logprobs, terms)
        weighted = targets._replace(weights=-terms.collect(slopes))
        _, gradient = loss_and_gradient(hidden, head, weighted, batch.denominator, kernels=kernels)
        return loss / batch.denominator, gradient

    def _dpo(self, logprobs: Tensor, terms: _Terms) -> tuple[Tensor, Tensor]:
        """(summed loss, slopes [M, T])."""
        gained = ((logprobs - terms.reference) * terms.weights).sum(dim=1)  # [M]
        scaled = self.beta * (gained[0::2] - gained[1::2])  # [P]
        counts = terms.is_target.view(len(scaled), -1).any(dim=1)  # [P]
        smoothing = self.label_smoothing
        losses = -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)
        by_margin = smoothing * torch.sigmoid(scaled) - (1 - smoothing) * torch.sigmoid(-scaled)
        by_margin = self.beta * by_margin * counts  # [P]
        by_row = torch.stack((by_margin, -by_margin), dim=1).view(-1, 1)  # [M, 1]
        return (losses * counts).sum(), by_row * terms.weights

    def _grpo(self, logprobs: Tensor, terms: _Terms) -> tuple[Tensor, Tensor]:
        """(summed loss, slopes [M, T])."""
        losses = slopes = -terms.advantages
        if self.beta:
            away = torch.where(terms.is_target, terms.reference - logprobs, 0.0)
            losses = losses + self.beta * (torch.exp(away) - away - 1)
            slopes = slopes - self.beta * away
        return (losses * terms.weights).sum(), slopes * terms.weights


class _Terms(NamedTuple):
    """Of M rows, on the device, all [M, T]: which positions have a target, the factor of each
    (0 where there is none), log p of the reference, and advantages; the last two 0 where not given.
    `at` int64 [N]: the targets among the M T positions; None: all of them."""

    is_target: Tensor
    weights: Tensor
    reference: Tensor
    advantages: Tensor
    at: Tensor | None

    @classmethod
    def of(cls, batch: Batch, rows: slice, targets: Targets, device: torch.device) -> _Terms:
        is_target = batch.labels[rows] >= 0

        def upload(array: np.ndarray | None) -> Tensor:
            values = np.zeros(is_target.shape) if array is None else array[rows]
            kept = np.where(is_target, values, 0).astype(np.float32)
            return torch.from_numpy(kept).to(device)

        ones = np.ones(batch.labels.shape, np.float32)
        return cls(
            torch.from_numpy(is_target).to(device),
            upload(ones if batch.token_weights is None else batch.token_weights),
            upload(batch.reference_logprobs),
            upload(batch.advantages),
            targets.rows,
        )

    def spread(self, values: Tensor) -> Tensor:
        """Values of the targets [N] in their places [M, T], 0 elsewhere. In rows they are summed
        in a fixed order, which an indexed sum on a card has not."""
        if self.at is None:
            return values.view(self.is_target.shape)
        dense = values.new_zeros(self.is_target.numel())
        dense[self.at] = values
        return dense.view(self.is_target.shape)

    def collect(self, values: Tensor) -> Tensor:
        """Values [M, T] of the targets alone [N]."""
        return values.flatten() if self.at is None else values.flatten()[self.at]
