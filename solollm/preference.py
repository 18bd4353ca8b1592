"""DPO and GRPO as functions of log-probabilities, in NumPy: what every backend's loss amounts to.

Both reach the weights only through log p of each target. So all there is to say of them is, given
these, the loss and its slope by each of them; a backend then takes the cross-entropy's gradients
with the slopes as weights. Held-out pairs are measured with the same functions.

DPO (Rafailov et al. 2023, arXiv:2305.18290), the sigmoid loss, smoothed as in cDPO:

    margin = sum(log p - log p_ref) of the chosen row - the same of the rejected row
    loss   = -(1 - s) log sigmoid(beta margin) - s log sigmoid(-beta margin)      per pair

GRPO (Shao et al. 2024, arXiv:2402.03300). Rollouts are drawn from the weights that are trained on
them, one step each, so that the ratio to the policy that drew them is 1 and its clipping idle; its
gradient is not:

    loss   = ratio (beta (exp(d) - d - 1) - advantage),  d = log p_ref - log p    per token
    slope  = -beta d - advantage

The first term is the k3 estimator of the KL divergence (Schulman 2020); with the ratio before it
its gradient is that of the divergence (DeepSeek-V3.2, arXiv:2512.02556; TRL's default). How tokens
are averaged is said by the batch: `token_weights` and `denominator`.

Shapes: B rows, T positions, P pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from solollm.backend import IGNORED, Batch, Objective
from solollm.errors import BackendError


class Scored(NamedTuple):
    """`loss`: summed, not yet divided by the denominator; `slopes` float64 [B, T]: its derivative
    by each log-probability, 0 where there is no target."""

    loss: float
    slopes: np.ndarray


def margins(batch: Batch, logprobs: np.ndarray) -> np.ndarray:
    """float64 [P]: by how much more than the reference the model prefers each chosen row; 0 for a
    pair without targets."""
    assert batch.reference_logprobs is not None, "a pair is measured against a reference"
    gained = _at_targets(batch, logprobs - batch.reference_logprobs) * _weights(batch)  # [B, T]
    rows: np.ndarray = gained.sum(axis=1, dtype=np.float64)
    difference: np.ndarray = rows[0::2] - rows[1::2]
    return difference


def has_targets(batch: Batch) -> np.ndarray:
    """bool [P]: pairs of an epoch's last batch may be padding."""
    is_target = batch.labels != IGNORED
    pairs: np.ndarray = is_target.reshape(len(is_target) // 2, -1).any(axis=1)
    return pairs


def dpo(batch: Batch, logprobs: np.ndarray, *, beta: float, label_smoothing: float = 0.0) -> Scored:
    """Direct preference optimisation of the batch's pairs, given log p of every target [B, T]."""
    scaled, counts = beta * margins(batch, logprobs), has_targets(batch)
    losses = -(1 - label_smoothing) * _log_sigmoid(scaled) - label_smoothing * _log_sigmoid(-scaled)
    down, up = np.exp(_log_sigmoid(-scaled)), np.exp(_log_sigmoid(scaled))
    by_margin = beta * (label_smoothing * up - (1 - label_smoothing) * down) * counts  # [P]
    by_row = np.stack([by_margin, -by_margin], axis=1).reshape(-1, 1)  # [B, 1]
    return Scored(float((losses * counts).sum()), by_row * _weights(batch))


def grpo(batch: Batch, logprobs: np.ndarray, *, beta: float) -> Scored:
    """Group relative policy optimisation of the batch's tokens, given log p of each [B, T]."""
    assert batch.advantages is not None, "a rollout has an advantage"
    weights, advantages = _weights(batch), _at_targets(batch, batch.advantages)
    losses, slopes = -advantages, -advantages
    if beta:
        assert batch.reference_logprobs is not None, "the KL term has a reference"
        away = _at_targets(batch, batch.reference_logprobs - logprobs)
        losses = losses + beta * (np.exp(away) - away - 1)
        slopes = slopes - beta * away
    return Scored(float((losses * weights).sum()), slopes * weights)


def require_fields(batch: Batch, objective: Objective, beta: float) -> None:
    """Raise BackendError unless the batch has what the objective reads."""
    needed = {"lm": (), "dpo": ("pair_ids", "reference_logprobs"), "grpo": ("advantages",)}
    names = [*needed[objective]]
    if objective == "grpo" and beta:
        names.append("reference_logprobs")
    missing = [name for name in names if getattr(batch, name) is None]
    if missing:
        raise BackendError(
            f"a batch of {objective} has no {' and no '.join(missing)}",
            why="its loss is made of them",
            fix="take batches from a stream of this objective",
        )
    if objective == "dpo":
        expected = np.arange(len(batch.labels)) // 2
        given = np.asarray(batch.pair_ids)
        if len(batch.labels) % 2 or not np.array_equal(given, expected):
            raise BackendError(
                "the rows of a DPO batch are not chosen, rejected, chosen, rejected ...",
                why=f"pair_ids are {given[:8].tolist()} ...",
                fix="rows 2k and 2k+1 are pair k",
            )


def rows_at_once(objective: Objective, micro_batch_size: int) -> int:
    """Rows of a micro-batch: pairs stay together, so that DPO takes an even number, 2 at least."""
    return micro_batch_size if objective != "dpo" else max(2, micro_batch_size // 2 * 2)


def _weights(batch: Batch) -> np.ndarray:
    """float64 [B, T]: the factor of each target, 0 where there is none."""
    ones = np.ones(batch.labels.shape)
    return _at_targets(batch, ones if batch.token_weights is None else batch.token_weights)


def _at_targets(batch: Batch, values: np.ndarray) -> np.ndarray:
    """float64; 0 where there is no target, whatever stands there."""
    return np.where(batch.labels != IGNORED, values, 0).astype(np.float64)


def _log_sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # not a number goes in and comes out
        result: np.ndarray = -np.logaddexp(0, -x)
    return result
