"""A step's promises: micro-batches, clipping, skipping, snapshots, checkpointing, bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch import compiling
from solollm_torch.kernels import load as load_kernels
from solollm_torch.session import TorchSession

from solollm.architecture import ModelConfig
from solollm.backend import Batch, DictSource, EngineOptions, HostTensor
from solollm.errors import BackendError, ConfigError

MakeSession = Callable[..., TorchSession]
MakeBatch = Callable[..., Batch]
PeakOf = Callable[[TorchSession, Batch], int]
State = dict[str, HostTensor]


def state_of(session: TorchSession) -> State:
    """Copies of everything in a snapshot, so that no alias of live memory can pass for it."""
    snapshot = session.snapshot()
    tensors = dict(snapshot.parameters()) | dict(snapshot.optimizer())
    return {name: t._replace(data=t.data.copy()) for name, t in tensors.items()}


def assert_same_bits(actual: State, expected: State) -> None:
    assert list(actual) == list(expected)
    changed = [n for n in expected if not np.array_equal(actual[n].data, expected[n].data)]
    assert not changed


def train(session: TorchSession, batch: Batch, steps: int) -> list[float]:
    return [session.train_step(batch, lr=3e-3).result().loss for _ in range(steps)]


@pytest.fixture
def peak_of(live_bytes: Any) -> Callable[[TorchSession, Batch], int]:
    """Bytes of a probe step above the session's own weights, gradients and states."""

    def peak(session: TorchSession, batch: Batch) -> int:
        session.probe_step(batch)
        with live_bytes() as watch:
            session.probe_step(batch)
        assert watch.live < watch.peak / 4, "the step's tensors must be gone: is it watched?"
        return int(watch.peak)

    return peak


def test_loss_falls(make_session: MakeSession, make_batch: MakeBatch) -> None:
    """A sign error anywhere in the step."""
    losses = train(make_session(), make_batch(8, 64), 15)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_equal_the_big_batch(
    make_session: MakeSession, make_batch: MakeBatch, size: int, packed: bool
) -> None:
    """A mean of means would weigh a token by its micro-batch's number of targets."""
    batch = make_batch(8, 64, packed=packed)
    whole, parts = make_session(micro_batch_size=8), make_session(micro_batch_size=size)
    train(whole, batch, 3)
    parts.import_parameters(DictSource.collect(whole.snapshot().parameters()))
    expected, actual = whole.probe_step(batch), parts.probe_step(batch)
    np.testing.assert_allclose(actual.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(actual.grad_norm, expected.grad_norm, rtol=1e-6)
    gradients = parts.gradients(batch)
    for name, gradient in whole.gradients(batch).items():
        assert (gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_four_micro_batches_peak_like_one(
    make_session: MakeSession, make_batch: MakeBatch, peak_of: PeakOf
) -> None:
    """Activations of one micro-batch must be gone before the next: that is what they are for."""
    batch = make_batch(8, 64)
    quarter = replace(
        batch, input_ids=batch.input_ids[:2], labels=batch.labels[:2], denominator=126.0
    )
    session = make_session(micro_batch_size=2)
    assert peak_of(session, batch) < 1.2 * peak_of(session, quarter)
    assert peak_of(make_session(micro_batch_size=8), batch) > 2 * peak_of(session, batch)


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointing_changes_memory_and_not_the_loss(
    make_session: MakeSession,
    make_batch: MakeBatch,
    tiny_config: ModelConfig,
    peak_of: PeakOf,
    packed: bool,
) -> None:
    """Recomputed blocks must meet the same inputs, and their activations must be gone."""
    deep = tiny_config.model_copy(update={"num_hidden_layers": 6})
    batch = make_batch(8, 64, packed=packed)
    plain, frugal = make_session(deep), make_session(deep, activation_checkpointing=True)
    for _ in range(3):
        expected, actual = train(plain, batch, 1)[0], train(frugal, batch, 1)[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert peak_of(frugal, batch) < 0.5 * peak_of(plain, batch)


def test_exact_clipping_scales_by_the_global_norm(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """The optimizer must see gradient * clip / (norm + 1e-6): AdamW's first moment shows it."""
    batch, clip = make_batch(8, 64), 0.05
    session = make_session(clip_norm=clip, beta1=0.5)
    gradients = session.gradients(batch)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients.values()])).item()
    metrics = session.train_step(batch, lr=0.0).result()
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-6)
    moments = dict(session.snapshot().optimizer())
    for name, gradient in gradients.items():
        expected = 0.5 * clip / (norm + 1e-6) * gradient.numpy()
        actual = moments[f"exp_avg.{name}"].data
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-12)


def test_small_gradients_are_not_scaled_up(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """The factor is capped at one."""
    batch = make_batch(8, 64)
    clipped, free = make_session(clip_norm=1e6), make_session(clip_norm=0)
    assert train(clipped, batch, 3) == train(free, batch, 3)
    assert_same_bits(state_of(clipped), state_of(free))


def test_lagged_clipping_uses_the_norm_of_the_step_before(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """And carries it over a resume: it is part of the session's state."""
    first, second = make_batch(8, 64, seed=1), make_batch(8, 64, seed=2)
    session = make_session(clip="lagged", clip_norm=0.05, beta1=0.5)
    norm = session.train_step(first, lr=0.0).result().grad_norm
    assert session.session_state == {"updates": 1, "lagged_norm": norm}
    name = "exp_avg.model.norm.weight"
    before = dict(session.snapshot().optimizer())[name].data.copy()
    gradient = session.gradients(second)["model.norm.weight"].numpy()
    session.train_step(second, lr=0.0).result()
    after = dict(session.snapshot().optimizer())[name].data
    expected = 0.5 * before + 0.5 * gradient * 0.05 / (norm + 1e-6)
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_non_finite_step_is_skipped_whole(
    make_session: MakeSession, make_batch: MakeBatch, optimizer: str
) -> None:
    """One NaN in a moment poisons a run for ever."""
    batch = make_batch(8, 64)
    session = make_session(name=optimizer)
    train(session, batch, 2)
    before, counters = state_of(session), session.session_state
    weights = np.ones(batch.labels.shape, np.float32)
    weights[3, 7] = np.nan
    metrics = session.train_step(replace(batch, token_weights=weights), lr=1e-2).result()
    assert metrics.skipped
    assert_same_bits(state_of(session), before)
    assert session.session_state == counters
    assert not session.train_step(batch, lr=1e-2).result().skipped


def test_probe_step_changes_nothing(make_session: MakeSession, make_batch: MakeBatch) -> None:
    """A certificate's probe in the middle of a run must leave no trace in it."""
    batch = make_batch(8, 64, packed=True)
    probed, undisturbed = make_session(), make_session()
    for _ in range(3):
        metrics = probed.probe_step(batch)
        step = probed.train_step(batch, lr=1e-3).result()
        assert metrics == step
        undisturbed.train_step(batch, lr=1e-3).result()
    assert_same_bits(state_of(probed), state_of(undisturbed))


def test_unresolved_step_is_finished_before_anything_reads_the_state(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """The update waits for the metrics; nobody may see the weights without it."""
    batch = make_batch(8, 64)
    waited, eager = make_session(), make_session()
    handles = [waited.train_step(batch, lr=1e-3) for _ in range(3)]
    expected = [eager.train_step(batch, lr=1e-3).result() for _ in range(3)]
    assert_same_bits(state_of(waited), state_of(eager))
    assert [handle.result() for handle in handles] == expected
    assert [handle.result() for handle in handles] == expected


def test_snapshot_keeps_its_value_while_training_goes_on(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """A checkpoint streamed over several steps must be of one of them."""
    batch = make_batch(8, 64)
    session = make_session()
    train(session, batch, 2)
    snapshot, copied = session.snapshot(), state_of(session)
    counters = dict(session.session_state)
    train(session, batch, 2)
    streamed = dict(snapshot.parameters()) | dict(snapshot.optimizer())
    assert_same_bits(streamed, copied)
    assert snapshot.session_state == counters
    specs = [*snapshot.parameter_specs(), *snapshot.optimizer_specs()]
    assert specs == [(name, t.dtype, t.shape) for name, t in streamed.items()]


@pytest.mark.parametrize("optimizer", [{"name": "adamw"}, {"name": "muon"}, {"state_bits": 8}])
def test_resumed_session_continues_to_the_same_bits(
    make_session: MakeSession, make_batch: MakeBatch, optimizer: dict[str, Any]
) -> None:
    """Anything left out of the exported state shows up here."""
    batches = [make_batch(8, 64, seed=seed, packed=True) for seed in range(4)]
    straight = make_session(**optimizer)
    for batch in batches[:2]:
        train(straight, batch, 1)
    snapshot = straight.snapshot()
    resumed = make_session(seed=5, **optimizer)
    resumed.import_parameters(DictSource.collect(snapshot.parameters()))
    resumed.import_optimizer(DictSource.collect(snapshot.optimizer()), snapshot.session_state)
    assert_same_bits(state_of(resumed), state_of(straight))
    for batch in batches[2:]:
        assert train(resumed, batch, 1) == train(straight, batch, 1)
    assert_same_bits(state_of(resumed), state_of(straight))


def test_same_settings_give_the_same_bits(make_session: MakeSession, make_batch: MakeBatch) -> None:
    """No hidden state, no order of threads, no uninitialised memory in the result."""
    states = []
    for _ in range(2):
        session = make_session(micro_batch_size=3, activation_checkpointing=True)
        train(session, make_batch(8, 64, packed=True), 4)
        states.append(state_of(session))
    assert_same_bits(states[0], states[1])


def test_token_logprobs_equal_log_softmax(make_session: MakeSession, make_batch: MakeBatch) -> None:
    """Positions without a target are zero; the others are the model's own log-probabilities."""
    batch = make_batch(5, 40, packed=True)
    session = make_session(micro_batch_size=2)
    train(session, make_batch(8, 64), 3)
    actual = session.token_logprobs(batch)
    input_ids, segments, _ = session._upload(batch, slice(None))
    expected = torch.log_softmax(session._decoder.logits(input_ids, segments), -1).detach()
    has_target = batch.labels != -100
    chosen = torch.from_numpy(np.where(has_target, batch.labels, 0)).long().unsqueeze(-1)
    expected_rows = expected.gather(-1, chosen).squeeze(-1).numpy() * has_target
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected_rows, rtol=1e-5, atol=1e-5)
    nll, targets = session.eval_step(batch)
    np.testing.assert_allclose(nll, -expected_rows.sum(dtype=np.float64), rtol=1e-6)
    assert targets == batch.num_targets


def test_bf16_compute_keeps_fp32_masters(make_session: MakeSession, make_batch: MakeBatch) -> None:
    """Weights are cast inside the loss; what is stored and updated stays fp32."""
    batch = make_batch(8, 64)
    narrow, full = make_session(compute_dtype="bfloat16"), make_session()
    losses = train(narrow, batch, 10)
    np.testing.assert_allclose(losses, train(full, batch, 10), rtol=2e-2)
    assert {tensor.dtype for tensor in state_of(narrow).values()} == {"F32"}


def test_engine_reads_the_live_weights(make_session: MakeSession, make_batch: MakeBatch) -> None:
    """Samples on the way must come from the weights of now."""
    session = make_session()
    session.train_step(make_batch(8, 64), lr=1e-2)
    engine = session.engine(EngineOptions())
    assert engine.model == session._model
    assert session.session_state["updates"] == 1


def test_settings_name_what_decides_bits(make_session: MakeSession) -> None:
    """A resume passes them back: it must get the same session."""
    session = make_session()
    decided = {"compile": False, "master": "float32", "gradients": "float32"}
    kernels, _ = load_kernels()
    decided["kernels"] = "off" if kernels is None else kernels.digest
    assert session.settings == {**decided, "threads": torch.get_num_threads()}
    assert make_session(backend_options=dict(session.settings)).settings == session.settings


def test_missing_compiler_warns_and_trains(
    make_session: MakeSession, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh machine has none; asking for the compiler must not end the run at step 1."""
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match=r"without torch.compile: there is no C\+\+ compiler"):
        session = make_session(backend_options={"compile": True})
    assert session.settings["compile"] is False
    train(session, make_batch(8, 64), 1)


def test_what_is_not_implemented_is_refused(make_session: MakeSession) -> None:
    """Silently training something else would cost a night."""
    with pytest.raises(BackendError, match="float16"):
        make_session(compute_dtype="float16")


def test_unusable_options_are_refused(make_session: MakeSession) -> None:
    """A typo must not be a setting without effect."""
    with pytest.raises(ConfigError, match="did you mean `compile`"):
        make_session(backend_options={"compil": True})
    with pytest.raises(ConfigError, match="auto, true or false"):
        make_session(backend_options={"compile": "yes please"})


def test_memory_is_reported(make_session: MakeSession) -> None:
    """Zero or a peak below the present would mislead the planner's comparison."""
    stats = make_session().memory()
    assert 0 < stats.current_bytes <= 2 * stats.peak_bytes
