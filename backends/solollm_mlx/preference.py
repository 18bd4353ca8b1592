"""DPO and GRPO on MLX: the cross-entropy's two passes over the head, with slopes as weights.

The first pass gives log p of every target; of these come the loss and its slope by each of them,
as in `solollm.preference`, which has the formulas. The second is the cross-entropy's own, each
target weighted with its slope: its gradient is the objective's. So [B, T, V] never exists here
either, and the head is multiplied once more than in plain training.

Shapes: M rows of a micro-batch, T positions, P pairs, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from solollm.backend import Batch, Objective, SessionOptions
from solollm_mlx import loss


class Terms(NamedTuple):
    """What an objective reads of M rows beside their targets, float32 [M, T]: the factor of each
    target, log p of the reference, advantages; `share` float32 scalar, 1 / denominator."""

    weights: mx.array
    reference: mx.array
    advantages: mx.array
    share: mx.array


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

    def summed_loss(
        self, hidden: mx.array, head: mx.array, labels: mx.array, *, terms: Terms,
        scale: mx.array, follow: Callable[..., mx.array],
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        """(what to take the gradient of, times the loss scale; the loss itself).

        hidden [M, T, C] in the compute dtype, head fp32 [V, C], labels int32 [M, T]; `follow`: the
        session's `loss.summed_loss`."""
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        is_target = labels >= 0  # [M, T]
        logprobs = loss.token_logprobs(mx.stop_gradient(flat), mx.stop_gradient(head), targets)
        logprobs = logprobs.reshape(labels.shape)  # [M, T]
        weights = mx.where(is_target, terms.weights, 0.0)
        if self.objective == "dpo":
            total, slopes = self._dpo(logprobs, weights, is_target, terms)
        else:
            total, slopes = self._grpo(logprobs, weights, is_target, terms)
        factors = (-slopes * (terms.share * scale)).reshape(-1)
        followed = follow(flat, head, targets, mx.stop_gradient(factors))
        return followed, mx.stop_gradient(total * terms.share)

    def _dpo(
        self, logprobs: mx.array, weights: mx.array, is_target: mx.array, terms: Terms
    ) -> tuple[mx.array, mx.array]:
        """(summed loss, slopes [M, T])."""
        gained = (mx.where(is_target, logprobs - terms.reference, 0.0) * weights).sum(axis=1)  # [M]
        scaled = self.beta * (gained[0::2] - gained[1::2])  # [P]
        counts = is_target.reshape(len(scaled), -1).any(axis=1)  # [P]
        smoothing = self.label_smoothing
        losses = -(1 - smoothing) * nn.log_sigmoid(scaled) - smoothing * nn.log_sigmoid(-scaled)
        by_margin = smoothing * mx.sigmoid(scaled) - (1 - smoothing) * mx.sigmoid(-scaled)
        by_margin = self.beta * by_margin * counts  # [P]
        by_row = mx.stack([by_margin, -by_margin], axis=1).reshape(-1, 1)  # [M, 1]
        return (losses * counts).sum(), by_row * weights

    def _grpo(
        self, logprobs: mx.array, weights: mx.array, is_target: mx.array, terms: Terms
    ) -> tuple[mx.array, mx.array]:
        """(summed loss, slopes [M, T])."""
        losses = slopes = -terms.advantages
        if self.beta:
            away = mx.where(is_target, terms.reference - logprobs, 0.0)
            losses = losses + self.beta * (mx.exp(away) - away - 1)
            slopes = slopes - self.beta * away
        return (losses * weights).sum(), slopes * weights


class HostTerms(NamedTuple):
    """`Terms` of a whole batch on the host, [B, T]; 1, 0 and 0 where the batch has none."""

    weights: np.ndarray
    reference: np.ndarray
    advantages: np.ndarray
    share: float

    @classmethod
    def of(cls, batch: Batch) -> HostTerms:
        def read(array: np.ndarray | None, default: float) -> np.ndarray:
            values = default if array is None else array
            return np.where(batch.labels >= 0, values, default).astype(np.float32)

        return cls(
            read(batch.token_weights, 1.0),
            read(batch.reference_logprobs, 0.0),
            read(batch.advantages, 0.0),
            1 / batch.denominator,
        )

    def uploaded(self, rows: Callable[[np.ndarray], mx.array]) -> Terms:
        """Of some rows on the device, as `rows` takes them from an array."""
        return Terms(
            rows(self.weights), rows(self.reference), rows(self.advantages), mx.array(self.share)
        )
