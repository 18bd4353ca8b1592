"""Conformance checks of loss, gradients and updates; see `solollm.testing.conformance`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from solollm.architecture import ParameterSpec, initial_parameters, parameter_table
from solollm.backend import IGNORED, Batch
from solollm.testing.bench import (
    LR,
    POSITIONS,
    ROWS,
    Bench,
    State,
    freeze,
    make_batch,
    require,
    require_close,
    require_same_state,
    state_of,
    train,
    with_denominator,
)


def capabilities_are_plain_data(bench: Bench) -> None:
    """A backend that promises nothing, or costs nothing, makes every plan wrong."""
    capabilities = bench.backend.capabilities()
    require("lm" in capabilities.objectives, "the language-model objective is missing")
    require("float32" in capabilities.train_dtypes, "float32 must be trainable everywhere")
    require(capabilities.preferred_dtype in capabilities.train_dtypes, "preferred_dtype is odd")
    require(bool(bench.backend.name), "the backend has no name")
    require(isinstance(type(bench.backend).probe().available, bool), "probe says nothing")
    session = bench.session()
    memory = session.memory()
    # Linux counts both in batches of pages, so that the peak may lag a little behind.
    possible = 0 < memory.current_bytes <= 1.05 * memory.peak_bytes
    require(possible, f"impossible memory: {memory}")
    session.close()


def initial_weights_are_the_cores(bench: Bench) -> None:
    """Own initial weights: two backends, or two device counts, train different models."""
    parameters = state_of(bench.session(seed=11)).parameters
    expected = dict(initial_parameters(bench.model, 11))
    require(list(parameters) == list(expected), "not the name table, in its order")
    for name, array in expected.items():
        require(np.array_equal(parameters[name].float32(), array), f"{name} differs")


def loss_is_sum_over_denominator(bench: Bench) -> None:
    """A mean over the batch's own targets: shards and micro-batches would be weighed wrongly."""
    session, batch = bench.lively_session(), make_batch()
    nll, targets = session.eval_step(batch)
    require(targets == batch.num_targets, f"{targets} targets instead of {batch.num_targets}")
    for denominator in (batch.denominator, 7.0):
        metrics = session.probe_step(with_denominator(batch, denominator))
        require_close(metrics.loss, nll / denominator, 1e-5, f"loss over {denominator}")
        require(metrics.tokens == targets, f"tokens {metrics.tokens} instead of {targets}")
    full, half = (
        session.probe_step(with_denominator(batch, n * batch.denominator)) for n in (1, 2)
    )
    require_close(half.grad_norm, full.grad_norm / 2, 1e-5, "gradient norm, denominator doubled")
    stepped = session.train_step(batch, lr=LR).result()
    require_close(stepped.loss, full.loss, 1e-6, "train_step's loss against probe_step's")
    require_close(stepped.grad_norm, full.grad_norm, 1e-5, "the same of the gradient norm")


def loss_does_not_depend_on_micro_batch(bench: Bench) -> None:
    """The mean of the micro-batches' means: rows with few targets count too much."""
    losses = []
    for size in (1, 4, ROWS):
        metrics = bench.lively_session(micro_batch_size=size).probe_step(make_batch())
        losses.append((metrics.loss, metrics.grad_norm))
    for loss, norm in losses[1:]:
        require_close(loss, losses[0][0], 1e-6, "loss")
        require_close(norm, losses[0][1], 1e-5, "gradient norm")


def token_logprobs_agree_with_eval(bench: Bench) -> None:
    """Two loss paths that drift apart: DPO and evaluation would score another model."""
    session, batch = bench.lively_session(), make_batch()
    logprobs = session.token_logprobs(batch)
    require(logprobs.shape == batch.labels.shape, f"shape {logprobs.shape}")
    require(logprobs.dtype == np.float32, f"dtype {logprobs.dtype}")
    require(not logprobs[batch.labels == IGNORED].any(), "not 0 where there is no target")
    require(bool((logprobs[batch.labels != IGNORED] < 0).all()), "a log-probability of 0 or more")
    nll, _ = session.eval_step(batch)
    require_close(float(-logprobs.sum(dtype=np.float64)), nll, 1e-6, "summed log-likelihood")


def ignored_labels_count_nothing(bench: Bench) -> None:
    """-100 used as an index, or counted: padding would be learned."""
    session, batch = bench.lively_session(micro_batch_size=1), make_batch()
    rows = np.concatenate([batch.input_ids, batch.input_ids[:2]])
    labels = np.concatenate([batch.labels, np.full((2, POSITIONS), IGNORED, np.int32)])
    padded = freeze(Batch(rows, labels, batch.denominator))
    plain = freeze(Batch(batch.input_ids, batch.labels, batch.denominator))
    with_padding, without = session.probe_step(padded), session.probe_step(plain)
    require_close(with_padding.loss, without.loss, 1e-6, "loss with rows of padding")
    require_close(with_padding.grad_norm, without.grad_norm, 1e-5, "gradient norm with padding")
    require(with_padding.tokens == plain.num_targets, "padding counted among the tokens")


def token_weights_scale_targets(bench: Bench) -> None:
    """Weights dropped, or normalised away, where the core asked for a plain factor."""
    session, batch = bench.lively_session(), make_batch()
    weights = np.random.default_rng(2).random(batch.labels.shape, np.float32)
    expected = float(-(session.token_logprobs(batch) * weights).sum()) / batch.denominator
    metrics = session.probe_step(freeze(replace(batch, token_weights=weights)))
    require_close(metrics.loss, expected, 1e-5, "weighted loss")


def later_tokens_change_nothing_before(bench: Bench) -> None:
    """A mask off by one: the model reads the answer and learns nothing."""
    session, batch = bench.lively_session(), make_batch(packed=False)
    changed = batch.input_ids.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % 90
    before = session.token_logprobs(batch)
    after = session.token_logprobs(freeze(replace(batch, input_ids=changed)))
    np.testing.assert_allclose(after[:, :12], before[:, :12], rtol=0, atol=1e-5)
    require(not np.allclose(after[:, 12:], before[:, 12:], atol=1e-3), "inputs have no effect")


def documents_do_not_see_each_other(bench: Bench) -> None:
    """Attention across a document border: packing would change what is learned."""
    session, batch = bench.lively_session(), make_batch(packed=False)
    for border in (1, 9, POSITIONS - 1):
        segments = np.zeros((ROWS, POSITIONS), np.int32)
        segments[:, border:] = 3
        packed = replace(batch, segment_ids=segments)
        changed = batch.input_ids.copy()
        changed[:, :border] = (changed[:, :border] + 1) % 90
        before = session.token_logprobs(freeze(packed))
        after = session.token_logprobs(freeze(replace(packed, input_ids=changed)))
        np.testing.assert_allclose(after[:, border:], before[:, border:], rtol=0, atol=1e-5)
        alone = np.roll(batch.input_ids, -border, axis=1), np.roll(batch.labels, -border, axis=1)
        apart = session.token_logprobs(freeze(Batch(*alone, batch.denominator)))
        length = POSITIONS - border
        np.testing.assert_allclose(apart[:, :length], before[:, border:], rtol=0, atol=1e-4)


def context_within_a_document_counts(bench: Bench) -> None:
    """A mask that hides everything isolates documents perfectly and learns bigrams."""
    session, batch = bench.lively_session(), make_batch(packed=False)
    segments = np.zeros((ROWS, POSITIONS), np.int32)
    segments[:, 9:] = 1
    one = session.token_logprobs(freeze(replace(batch, segment_ids=np.zeros_like(segments))))
    plain = session.token_logprobs(batch)
    np.testing.assert_allclose(one, plain, rtol=0, atol=1e-5)
    two = session.token_logprobs(freeze(replace(batch, segment_ids=segments)))
    require(not np.allclose(two[:, 9], plain[:, 9], atol=1e-3), "the document border is not seen")


def batches_are_only_read(bench: Bench) -> None:
    """Data crosses as int32 that the core owns: widened in place, or written to, it spoils the
    next use. The batches of every check are read-only; here their bits are compared."""
    session, batch = bench.session(), make_batch()
    pieces = (batch.input_ids, batch.labels, batch.segment_ids)
    before = [None if piece is None else piece.tobytes() for piece in pieces]
    session.train_step(batch, lr=LR).result()
    session.eval_step(batch)
    after = [None if piece is None else piece.tobytes() for piece in pieces]
    require(before == after, "the batch was written to")


def training_lowers_the_loss(bench: Bench) -> None:
    """A wrong sign, gradients of one half of a tied head, an update that is lost."""
    session, batch = bench.session(), make_batch()
    first = session.probe_step(batch).loss
    for _ in range(25):
        session.train_step(batch, lr=2 * LR).result()
    last = session.probe_step(batch).loss
    require(last < 0.8 * first, f"25 steps on one batch: loss {first} -> {last}")


def probe_and_eval_change_nothing(bench: Bench) -> None:
    """Gradients left behind, or a counter moved: the run would depend on how often it looked."""
    probed, plain = bench.session(), bench.session()
    train(probed, range(2))
    train(plain, range(2))
    before = state_of(probed)
    probed.probe_step(make_batch(50))
    probed.eval_step(make_batch(51))
    probed.token_logprobs(make_batch(52))
    require_same_state(state_of(probed), before, "after probe_step and eval_step")
    train(probed, [2])
    train(plain, [2])
    require_same_state(state_of(probed), state_of(plain), "the step after a probe")


def non_finite_batches_are_skipped_whole(bench: Bench) -> None:
    """One overflow that reaches weights or moments ends a run of weeks."""
    session, undisturbed = bench.session(), bench.session()
    train(session, range(2))
    train(undisturbed, range(2))
    before = state_of(session)
    weights = np.ones((ROWS, POSITIONS), np.float32)
    weights[ROWS - 1] = np.nan
    poisoned = with_denominator(make_batch(60), float("nan"))
    for batch in (poisoned, freeze(replace(make_batch(61), token_weights=weights))):
        metrics = session.train_step(batch, lr=LR).result()
        require(metrics.skipped, "a step with a NaN loss is not reported as skipped")
        require_same_state(state_of(session), before, "after a skipped step")
    good, same = train(session, [2])[0], train(undisturbed, [2])[0]
    require(not good.skipped, "the step after a skipped one was skipped too")
    require(good == same, f"the step after a skipped one: {good} instead of {same}")
    require_same_state(state_of(session), state_of(undisturbed), "the step after a skipped one")


def clipping_bounds_the_gradient_and_not_the_metric(bench: Bench) -> None:
    """A norm reported after clipping hides every spike; a factor applied twice slows training."""
    if bench.table.state_bits != 32:
        return
    plain = bench.table.model_copy(update={"clip_norm": 0.0})
    full = bench.session(table=plain).train_step(make_batch(), lr=LR).result().grad_norm
    for limit in (0.0, full / 10):
        table = bench.table.model_copy(update={"clip_norm": limit})
        session = bench.session(table=table)
        metrics = session.train_step(make_batch(), lr=LR).result()
        require_close(metrics.grad_norm, full, 1e-6, f"grad_norm with clip_norm {limit}")
        seen = _first_gradient_norm(bench, state_of(session))
        require_close(seen, limit or full, 1e-4, f"the gradient used with clip_norm {limit}")


def _first_gradient_norm(bench: Bench, state: State) -> float:
    """The norm of the first step's gradient, from the states that it left."""
    shares = {"exp_avg": 1 - bench.table.beta1, "momentum_buffer": 1 - bench.table.momentum_start}
    total = 0.0
    for name, tensor in state.optimizer.items():
        share = shares.get(name.split(".")[0])
        if share is not None:
            total += float(np.square(tensor.data.astype(np.float64) / share).sum())
    return float(total**0.5)


def updates_follow_the_formulas(bench: Bench) -> None:
    """Bias correction, decay by the name table, Muon's scale and warm-up: recomputed in float64
    from the exported states of three steps."""
    if bench.table.state_bits != 32:
        return
    session = bench.session()
    states = [state_of(session)]
    for index in range(3):
        train(session, [index])
        states.append(state_of(session))
    for spec in parameter_table(bench.model):
        for index in range(3):
            expected = _updated(bench, spec, (states[index], states[index + 1]), index)
            actual = states[index + 1].parameters[spec.name].data
            message = f"{spec.name}, update {index}"
            np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6, err_msg=message)


def _updated(
    bench: Bench, spec: ParameterSpec, states: tuple[State, State], index: int
) -> np.ndarray:
    """float64: the weight after update `index`, from the weight before and the states after."""
    table, lr = bench.table, LR * (1 + index % 3)
    weight = states[0].parameters[spec.name].data.astype(np.float64)
    if spec.decay:
        weight = weight * (1 - lr * table.weight_decay)
    after = {name: tensor.data.astype(np.float64) for name, tensor in states[1].optimizer.items()}
    if table.name == "muon" and spec.group == "matrix":
        name = f"momentum_buffer.{spec.name}"
        buffer, before = after[name], states[0].optimizer[name].data.astype(np.float64)
        done = min(1.0, index / table.momentum_warmup_steps)
        momentum = table.momentum_start + (table.momentum - table.momentum_start) * done
        gradient = (buffer - momentum * before) / (1 - momentum)
        nesterov = momentum * buffer + (1 - momentum) * gradient
        step = 0.2 * float(max(spec.shape)) ** 0.5 * orthogonalized(nesterov)
        return np.asarray(weight - lr * step)
    first = after[f"exp_avg.{spec.name}"] / (1 - table.beta1 ** (index + 1))
    second = after[f"exp_avg_sq.{spec.name}"] / (1 - table.beta2 ** (index + 1))
    return np.asarray(weight - lr * first / (np.sqrt(second) + table.eps))


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps (Jordan 2024) in float64; zero stays zero."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return np.asarray(x if x.shape == matrix.shape else x.T)


MODEL_CHECKS = (
    capabilities_are_plain_data,
    initial_weights_are_the_cores,
    loss_is_sum_over_denominator,
    loss_does_not_depend_on_micro_batch,
    token_logprobs_agree_with_eval,
    ignored_labels_count_nothing,
    token_weights_scale_targets,
    later_tokens_change_nothing_before,
    documents_do_not_see_each_other,
    context_within_a_document_counts,
    batches_are_only_read,
)
OPTIMIZER_CHECKS = (
    training_lowers_the_loss,
    probe_and_eval_change_nothing,
    non_finite_batches_are_skipped_whole,
    clipping_bounds_the_gradient_and_not_the_metric,
    updates_follow_the_formulas,
)
