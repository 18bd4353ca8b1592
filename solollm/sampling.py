"""From one row of logits to a token: the reference of sampling, in NumPy.

The steps and their order are those of `transformers`' generate: repetition penalty, the request's
own logits processors, temperature, top-k, top-p, min-p. Padding ids are taken out before the first
of them. The random number is a pure function of (seed, position), so a request's tokens do not
depend on what else is being generated, nor on how often it was interrupted.

Every backend's engine samples with this file; what runs on a device is only the greedy choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from solollm.backend import LogitsProcessor, SamplingParams
from solollm.errors import BackendError, ConfigError
from solollm.optim_codec import counter_uniform

# Below it, the second likeliest of two float32 logits has no chance left, and quotients overflow.
_MIN_TEMPERATURE = 1e-6
_MIN_PENALTY, _MAX_PENALTY = 1e-6, 1e6  # beyond them logits become infinite, and then no number


class Candidates(NamedTuple):
    """The tokens that may be drawn: ids int64 [n], ascending, and float64 [n] that sum to 1."""

    ids: np.ndarray
    probabilities: np.ndarray


def check_sampling(params: SamplingParams) -> None:
    """Raises ConfigError for a value outside its range; NaN is outside every range."""
    ranges = [
        ("temperature", params.temperature, 0 <= params.temperature < math.inf, "0 or more"),
        ("top_k", params.top_k, params.top_k >= 0, "0 (off) or more"),
        ("top_p", params.top_p, 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("min_p", params.min_p, 0 <= params.min_p <= 1, "from 0 to 1"),
        ("repetition_penalty", params.repetition_penalty,
         0 < params.repetition_penalty < math.inf, "above 0 (1 is off)"),
    ]  # fmt: skip
    for name, value, is_valid, allowed in ranges:
        if not is_valid:
            raise ConfigError(f"{name} = {value} cannot be sampled with", fix=f"give {allowed}")


def is_plain_greedy(params: SamplingParams, processors: Sequence[LogitsProcessor] = ()) -> bool:
    """Whether the choice is the bare argmax, which a device makes without the host."""
    return params.temperature == 0 and params.repetition_penalty == 1 and not processors


def adjust(
    logits: np.ndarray,
    params: SamplingParams,
    history: np.ndarray,
    *,
    vocab_size: int = 0,
    processors: Sequence[LogitsProcessor] = (),
) -> np.ndarray:
    """The logits that are chosen from: padding masked, penalty and processors applied.

    Args:
        logits: float32 [V]; not written to.
        history: integer [n], the prompt and the tokens so far.
        vocab_size: ids from here on become -inf (0: none).

    Raises:
        BackendError: a NaN among the logits, or no token left to choose.
    """
    adjusted = np.array(logits, np.float32)
    if vocab_size:
        adjusted[vocab_size:] = -np.inf
    if params.repetition_penalty != 1:  # Keskar et al. 2019, arXiv:1909.05858
        seen = adjusted[history]
        factor = np.float32(min(max(params.repetition_penalty, _MIN_PENALTY), _MAX_PENALTY))
        adjusted[history] = np.where(seen < 0, seen * factor, seen / factor)
    if processors:
        ids = history.tolist()
        for process in processors:
            adjusted = np.asarray(process(ids, adjusted), np.float32)
        if vocab_size:  # a processor may have brought them back
            adjusted[vocab_size:] = -np.inf
    top = adjusted.max()
    if not np.isfinite(top):
        raise BackendError(
            f"no token can be chosen: the largest logit is {top}",
            why="the weights give no finite logits, or the logits processors left no token",
            fix="check that training did not diverge, and the request's logits processors",
        )
    return adjusted


def candidates(adjusted: np.ndarray, params: SamplingParams) -> Candidates:
    """What remains of adjusted logits [V] after temperature, top-k, top-p and min-p.

    Ties at the border of top-k all stay, as in `transformers`; at the border of top-p the lower
    ids stay. `params.temperature` must be above 0.
    """
    ids = np.flatnonzero(adjusted > -np.inf)
    scaled = adjusted[ids] / np.float32(max(params.temperature, _MIN_TEMPERATURE))
    if 0 < params.top_k < len(scaled):
        border = np.partition(scaled, len(scaled) - params.top_k)[len(scaled) - params.top_k]
        ids, scaled = _keep(scaled >= border, ids, scaled)
    probabilities = _softmax(scaled)
    if params.top_p < 1:
        ids, probabilities = _keep(_nucleus(probabilities, params.top_p), ids, probabilities)
    if params.min_p > 0:
        floor = params.min_p * probabilities.max()
        ids, probabilities = _keep(probabilities >= floor, ids, probabilities)
    return Candidates(ids, probabilities / probabilities.sum())


def draw(choices: Candidates, *, seed: int, position: int) -> int:
    """The token at `position` (tokens before it) of the request with this seed."""
    uniform = float(counter_uniform(seed, position, "sample", 1)[0])
    cumulative = np.cumsum(choices.probabilities)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(choices.ids[min(index, len(choices.ids) - 1)])


def choose(
    logits: np.ndarray,
    params: SamplingParams,
    history: np.ndarray,
    *,
    vocab_size: int = 0,
    processors: Sequence[LogitsProcessor] = (),
) -> int:
    """The next token for a row of logits: `adjust`, then the argmax or a draw."""
    adjusted = adjust(logits, params, history, vocab_size=vocab_size, processors=processors)
    if params.temperature == 0:
        return int(adjusted.argmax())
    return draw(candidates(adjusted, params), seed=params.seed, position=len(history))


def _keep(mask: np.ndarray, ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids[mask], values[mask]


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max()).astype(np.float64)
    shares: np.ndarray = powers / powers.sum()
    return shares


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """bool [n]: the smallest set of most likely tokens that holds `top_p` of the mass
    (Holtzman et al. 2020, arXiv:1904.09751)."""
    ascending = np.sort(probabilities)
    removed = int(np.searchsorted(np.cumsum(ascending), 1 - top_p, side="right"))
    removed = min(removed, len(ascending) - 1)
    border = ascending[removed]
    kept: np.ndarray = probabilities > border
    ties = np.flatnonzero(probabilities == border)
    kept[ties[: len(ascending) - removed - int(kept.sum())]] = True
    return kept
