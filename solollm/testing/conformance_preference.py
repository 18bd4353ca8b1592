"""Conformance checks of the objectives DPO and GRPO; see `solollm.testing.conformance`.

The reference is `solollm.preference`: what the losses are as functions of log-probabilities, which
a session shows by `token_logprobs`. That gradients are the loss's own is proven through the
cross-entropy, which has checks of its own: weighted with the slopes it must make the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from solollm.backend import IGNORED, Batch, TrainSession
from solollm.errors import BackendError
from solollm.preference import Scored, dpo, grpo
from solollm.testing.bench import (
    LR,
    ROWS,
    Bench,
    freeze,
    make_batch,
    require,
    require_close,
    require_same_state,
    state_of,
)


def make_preference_batch(bench: Bench, index: int = 0, *, rows: int = ROWS) -> Batch:
    """A batch with what the bench's objective reads: rows of pairs, or packed rollouts. Where there
    is no target its reference, advantages and weights are nonsense, which nobody may read."""
    noise = np.random.default_rng(300 + index)
    batch = make_batch(index, rows=rows, packed=bench.objective == "grpo")
    is_target = batch.labels != IGNORED

    def at_targets(values: np.ndarray) -> np.ndarray:
        return np.where(is_target, values, 1e3).astype(np.float32)

    shape = batch.labels.shape
    batch = replace(
        batch,
        reference_logprobs=at_targets(-4.5 + 0.3 * noise.standard_normal(shape)),
        token_weights=at_targets(0.5 + noise.random(shape)),
    )
    if bench.objective == "dpo":
        pairs = (np.arange(rows) // 2).astype(np.int32)
        return freeze(replace(batch, pair_ids=pairs, denominator=float(rows // 2)))
    return freeze(replace(batch, advantages=at_targets(noise.standard_normal(shape))))


def scored(bench: Bench, session: TrainSession, batch: Batch) -> Scored:
    """The reference's loss and slopes at the session's own log-probabilities."""
    logprobs = session.token_logprobs(batch)
    if bench.objective == "dpo":
        return dpo(batch, logprobs, beta=bench.beta, label_smoothing=bench.label_smoothing)
    return grpo(batch, logprobs, beta=bench.beta)


def preference_losses_are_the_references(bench: Bench) -> None:
    """A sign, a pair the wrong way round, a mean of means: the run optimises something else."""
    session, batch = _session(bench), make_preference_batch(bench)
    expected = scored(bench, session, batch).loss / batch.denominator
    require_close(session.probe_step(batch).loss, expected, 1e-5, f"the loss of {bench.objective}")
    halved = freeze(replace(batch, denominator=2 * batch.denominator))
    require_close(session.probe_step(halved).loss, expected / 2, 1e-5, "with twice the denominator")


def preference_gradients_are_the_references(bench: Bench) -> None:
    """A loss that is reported and another that is followed: the step must be the one of the
    cross-entropy weighted with the slopes."""
    session, batch = _session(bench), make_preference_batch(bench)
    weights = (-scored(bench, session, batch).slopes).astype(np.float32)
    weighted = freeze(Batch(batch.input_ids, batch.labels, batch.denominator, batch.segment_ids,
                            weights))  # fmt: skip
    plain = _session(replace(bench, objective="lm"))
    expected, found = plain.probe_step(weighted), session.probe_step(batch)
    require_close(found.grad_norm, expected.grad_norm, 1e-4, "gradient norm")
    plain.train_step(weighted, lr=LR).result()
    session.train_step(batch, lr=LR).result()
    after, same = state_of(session), state_of(plain)
    for name, tensor in same.optimizer.items():
        found_state, expected_state = after.optimizer[name].float32(), tensor.float32()
        largest = float(np.abs(expected_state).max())
        np.testing.assert_allclose(
            found_state, expected_state, rtol=0, atol=1e-4 * largest + 1e-12, err_msg=name
        )


def preference_does_not_depend_on_micro_batch(bench: Bench) -> None:
    """A pair that is split has no margin; a group's mean over the rows at hand is another loss."""
    batch = make_preference_batch(bench)
    whole = _session(bench, micro_batch_size=ROWS).probe_step(batch)
    for size in (1, 3, 4):
        part = _session(bench, micro_batch_size=size).probe_step(batch)
        require_close(part.loss, whole.loss, 1e-5, f"loss, {size} rows at once")
        require_close(part.grad_norm, whole.grad_norm, 1e-4, f"gradient norm, {size} rows at once")


def preference_padding_counts_nothing(bench: Bench) -> None:
    """A pair of padding has margin 0 and would add log 2 to the loss; what stands beside ignored
    labels, the prompt's tokens, must reach no gradient."""
    session, batch = _session(bench), make_preference_batch(bench)
    is_target = batch.labels != IGNORED
    for nonsense in (-7.0, float("nan")):
        fields: dict[str, Any] = {
            name: np.where(is_target, getattr(batch, name), nonsense).astype(np.float32)
            for name in ("reference_logprobs", "token_weights", "advantages")
            if getattr(batch, name) is not None
        }
        other = freeze(replace(batch, **fields))
        require(session.probe_step(other) == session.probe_step(batch), "ignored labels are read")
    longer = make_preference_batch(bench, rows=ROWS + 2)
    labels = np.concatenate([batch.labels, np.full_like(batch.labels[:2], IGNORED)])

    def extended(name: str) -> Any:
        array = getattr(batch, name)
        return None if array is None else np.concatenate([array, getattr(longer, name)[-2:]])

    names = ("input_ids", "segment_ids", "token_weights", "reference_logprobs", "advantages")
    padded = replace(
        batch, labels=labels, pair_ids=longer.pair_ids, **{n: extended(n) for n in names}
    )
    with_padding, without = session.probe_step(freeze(padded)), session.probe_step(batch)
    require_close(with_padding.loss, without.loss, 1e-6, "loss with rows of padding")
    require_close(with_padding.grad_norm, without.grad_norm, 1e-5, "gradient norm with padding")


def incomplete_preference_batches_are_refused(bench: Bench) -> None:
    """A missing reference taken for zeros trains without a word on something else."""
    batch = make_preference_batch(bench)
    broken: list[Batch] = [replace(batch, reference_logprobs=None)]
    if bench.objective == "dpo":
        swapped = np.asarray(batch.pair_ids)[::-1].copy()
        broken += [replace(batch, pair_ids=None), replace(batch, pair_ids=swapped)]
    else:
        broken.append(replace(batch, advantages=None))
    session = _session(bench)
    for one in broken:
        try:
            session.probe_step(one)
        except BackendError:
            continue
        raise AssertionError(f"an incomplete batch of {bench.objective} was trained on")


def non_finite_preferences_are_skipped_whole(bench: Bench) -> None:
    """One reward that is not a number would reach weights and moments."""
    session, batch = _session(bench), make_preference_batch(bench)
    before = state_of(session)
    assert batch.reference_logprobs is not None
    reference = batch.reference_logprobs.copy()
    reference[np.nonzero(batch.labels != IGNORED)[0][0]] = np.nan
    metrics = session.train_step(freeze(replace(batch, reference_logprobs=reference)), lr=LR)
    require(metrics.result().skipped, "a step with a NaN reference is not reported as skipped")
    require_same_state(state_of(session), before, "after a skipped step")


def preference_training_lowers_the_loss(bench: Bench) -> None:
    """Steps uphill, or none: 15 of them on one batch."""
    session, batch = _session(bench), make_preference_batch(bench)
    first = scored(bench, session, batch)
    for _ in range(15):
        session.train_step(batch, lr=LR).result()
    if bench.objective == "dpo":
        last = scored(bench, session, batch).loss
        require(last < 0.8 * first.loss, f"loss {first.loss} -> {last}")
        return
    assert batch.advantages is not None
    assert batch.token_weights is not None
    weights = np.where(batch.labels != IGNORED, batch.advantages * batch.token_weights, 0)
    gained = float((weights * session.token_logprobs(batch)).sum())
    before = float((weights * _session(bench).token_logprobs(batch)).sum())
    require(gained > before + 1, f"advantage-weighted log p {before} -> {gained}")


def _session(bench: Bench, *, micro_batch_size: int = 4) -> TrainSession:
    make = bench.session if bench.adapter is not None else bench.lively_session
    session = make(micro_batch_size=micro_batch_size)
    return session


CHECKS: tuple[Callable[[Bench], None], ...] = (
    preference_losses_are_the_references,
    preference_gradients_are_the_references,
    preference_does_not_depend_on_micro_batch,
    preference_padding_counts_nothing,
    incomplete_preference_batches_are_refused,
    non_finite_preferences_are_skipped_whole,
    preference_training_lowers_the_loss,
)
