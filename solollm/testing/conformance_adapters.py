"""Conformance checks of a frozen base with an adapter; see `solollm.testing.conformance`.

The base is that of `lively_parameters`. Where it is quantised no check asks for its exact values,
which are the backend's own: every comparison is between sessions over the same codes, or by the
base that `token_logprobs(adapter=False)` shows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from solollm.adapters import adapter_pairs, adapter_table, merged
from solollm.architecture import initial_parameter
from solollm.backend import DictSource, EngineOptions, HostTensor, TrainSession
from solollm.generation import generate
from solollm.testing.bench import (
    LR,
    REAL_VOCAB_SIZE,
    Bench,
    lively_parameters,
    make_batch,
    prompts,
    request,
    require,
    require_close,
    require_same_state,
    state_of,
    train,
)
from solollm.testing.conformance_state import take_over, wrong_parameters_are_named_in

ALIKE = 0.9  # what 4 bits leave of this small model's log-probabilities; misplaced rows: about 0


def adapters_start_at_the_cores_values(bench: Bench) -> None:
    """Other names, order or first values: the run of one backend is not that of another."""
    assert bench.adapter is not None
    parameters = state_of(bench.session(seed=11)).parameters
    table = adapter_table(bench.model, bench.adapter)
    require(list(parameters) == [spec.name for spec in table], "not the adapter table, in order")
    for spec in table:
        same = np.array_equal(parameters[spec.name].float32(), initial_parameter(spec, 11))
        require(same, f"{spec.name} differs")


def a_fresh_adapter_changes_nothing(bench: Bench) -> None:
    """A factor B that is not zero, or a base read in another order: the first step starts from
    another model than the one that was chosen."""
    session, batch = bench.session(), make_batch()
    with_adapter = session.token_logprobs(batch)
    base = session.token_logprobs(batch, adapter=False)
    np.testing.assert_allclose(with_adapter, base, rtol=0, atol=1e-6)
    plain = replace(bench, adapter=None).lively_session().token_logprobs(batch)
    is_target = batch.labels >= 0
    if bench.adapter is not None and bench.adapter.base_bits is not None:
        alike = float(np.corrcoef(base[is_target], plain[is_target])[0, 1])
        require(alike > ALIKE, f"the quantised base correlates by {alike:.3f} with what it was")
    else:
        far = float(np.abs(base - plain).max())
        require(far <= 1e-5, f"the base is off by {far:.2e} nats")


def adapters_learn_and_the_base_stays(bench: Bench) -> None:
    """An update that reaches frozen weights, or an adapter that no gradient reaches."""
    session, batch = bench.session(), make_batch()
    before = session.token_logprobs(batch, adapter=False)
    first = session.eval_step(batch)[0]
    for _ in range(12):
        session.train_step(batch, lr=2e-2).result()
    require(session.eval_step(batch)[0] < 0.95 * first, "twelve steps on one batch do not help")
    same = np.array_equal(session.token_logprobs(batch, adapter=False), before)
    require(same, "training changed the base")
    for name, tensor in state_of(session).parameters.items():
        require(bool(np.abs(tensor.float32()).max() > 0), f"{name} never moved")


def an_adapter_is_its_merged_model(bench: Bench) -> None:
    """A scale forgotten or taken twice, a factor transposed, an adapter on the neighbour's rows."""
    if bench.adapter is None or bench.adapter.base_bits is not None:
        return  # the base's exact values are the backend's own; export has a test of its own
    session, batch = _moved(bench), make_batch()
    whole = _merged_session(bench, session)
    actual, expected = session.token_logprobs(batch), whole.token_logprobs(batch)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    require(float(np.abs(actual - session.token_logprobs(batch, adapter=False)).max()) > 1e-2,
            "the adapter has no effect")  # fmt: skip


def adapter_gradients_are_those_of_the_whole(bench: Bench) -> None:
    """dA = scale B^T dW and dB = scale dW A^T, with dW the gradient of the merged weight: read from
    the first moment of the first update, which is (1 - beta1) times the gradient."""
    if bench.adapter is None or bench.adapter.base_bits is not None:
        return
    plain = replace(bench, table=bench.table.model_copy(update={"clip_norm": 0.0}))
    session = _moved(plain)
    factors = state_of(session).parameters
    whole = _merged_session(plain, session)
    for one in (session, whole):
        one.train_step(make_batch(), lr=LR).result()
    of_factors, of_whole = state_of(session).optimizer, state_of(whole).optimizer
    scale = bench.adapter.scale
    for pair in adapter_pairs(bench.model, bench.adapter):
        dense = of_whole[f"exp_avg.{pair.base.name}"].data
        a, b = factors[pair.a.name].data, factors[pair.b.name].data
        for spec, expected in ((pair.a, scale * b.T @ dense), (pair.b, scale * dense @ a.T)):
            actual = of_factors[f"exp_avg.{spec.name}"].data
            limit = 1e-4 * float(np.abs(expected).max())
            np.testing.assert_allclose(actual, expected, rtol=0, atol=limit, err_msg=spec.name)


def adapter_states_have_pefts_names(bench: Bench) -> None:
    """A run moves between backends, and its adapter to PEFT, by these names and shapes."""
    assert bench.adapter is not None
    expected = {
        f"{kind}.{spec.name}": ("F32", spec.shape)
        for spec in adapter_table(bench.model, bench.adapter)
        for kind in ("exp_avg", "exp_avg_sq")
    }
    found = {n: (t.dtype, t.shape) for n, t in state_of(bench.session()).optimizer.items()}
    require(found == expected, f"other states: {sorted(found.items() ^ expected.items())[:4]}")


def a_resumed_adapter_equals_an_undisturbed_one(bench: Bench) -> None:
    """A base that is quantised otherwise the second time, a moment left out."""
    straight, first = bench.session(), bench.session()
    losses = train(straight, range(6))
    train(first, range(3))
    state, settings = state_of(first), first.settings
    first.close()
    second = bench.session(seed=99, settings=settings)
    take_over(second, state)
    require_same_state(state_of(second), state, "after export and import")
    require(train(second, range(3, 6)) == losses[3:], "metrics differ after a resume")
    require_same_state(state_of(second), state_of(straight), "resumed against undisturbed")


def micro_batches_do_not_change_adapters(bench: Bench) -> None:
    """Gradients of factors accumulated twice, or not at all, over micro-batches."""
    found = [bench.session(micro_batch_size=n).probe_step(make_batch()) for n in (1, 4)]
    require_close(found[0].loss, found[1].loss, 1e-6, "loss")
    require_close(found[0].grad_norm, found[1].grad_norm, 1e-5, "gradient norm")


def wrong_adapters_are_named(bench: Bench) -> None:
    """A factor silently left at its first value, or of another rank."""
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    session = bench.session()
    wrong_parameters_are_named_in(
        session.import_parameters, dict(state_of(session).parameters), name
    )


def adapter_engines_generate_what_the_session_scores(bench: Bench) -> None:
    """Samples and rollouts drawn from the base alone: greedy tokens must be the adapter's own."""
    session = _moved(bench)
    options = EngineOptions(max_batch_size=4, vocab_size=REAL_VOCAB_SIZE)
    asked = [request(prompt, new=4) for prompt in prompts(3)]
    for one, completion in zip(asked, generate(session.engine(options), asked), strict=True):
        ids = [*one.prompt_ids, *completion.ids]
        batch = make_batch(rows=1, packed=False)
        inputs, labels = batch.input_ids.copy(), np.full_like(batch.labels, -100)
        inputs[0, : len(ids) - 1] = ids[:-1]
        labels[0, len(one.prompt_ids) - 1 : len(ids) - 1] = completion.ids
        scored = session.token_logprobs(replace(batch, input_ids=inputs, labels=labels))
        expected = scored[0, len(one.prompt_ids) - 1 : len(ids) - 1]
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-4)


def _moved(bench: Bench) -> TrainSession:
    """A session whose adapter matters: random factors of a size that shows."""
    assert bench.adapter is not None
    session, noise = bench.session(), np.random.default_rng(17)
    factors = {
        spec.name: HostTensor.of(
            (noise.standard_normal(spec.shape) * spec.shape[1] ** -0.5 * 0.5).astype(np.float32)
        )
        for spec in adapter_table(bench.model, bench.adapter)
    }
    session.import_parameters(DictSource(factors))
    return session


def _merged_session(bench: Bench, session: TrainSession) -> TrainSession:
    """All parameters of the same model, the session's adapter merged into them."""
    assert bench.adapter is not None
    tensors, factors = lively_parameters(bench.model), state_of(session).parameters
    for pair in adapter_pairs(bench.model, bench.adapter):
        a, b = factors[pair.a.name].data, factors[pair.b.name].data
        weight = tensors[pair.base.name].data
        tensors[pair.base.name] = HostTensor.of(merged(weight, a, b, bench.adapter.scale))
    whole = replace(bench, adapter=None).session()
    whole.import_parameters(DictSource(tensors))
    return whole


CHECKS = (
    adapters_start_at_the_cores_values,
    a_fresh_adapter_changes_nothing,
    adapters_learn_and_the_base_stays,
    an_adapter_is_its_merged_model,
    adapter_gradients_are_those_of_the_whole,
    adapter_states_have_pefts_names,
    a_resumed_adapter_equals_an_undisturbed_one,
    micro_batches_do_not_change_adapters,
    wrong_adapters_are_named,
    adapter_engines_generate_what_the_session_scores,
)
