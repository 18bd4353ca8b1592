"""A step's promises: compiled or not, cut or whole, clipped, skipped, scaled, bounded in memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
import mlx.core as mx
from solollm_mlx import compiling, loss
from solollm_mlx.backend import MlxBackend
from solollm_mlx.session import INITIAL_SCALE, MlxSession

from solollm.architecture import ModelConfig
from solollm.backend import Batch, DictSource, HostTensor, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.errors import ConfigError, IntegrityError
from solollm.testing.bench import require_same_state, state_of

MakeSession = Callable[..., MlxSession]
MakeBatch = Callable[..., Batch]


def train(session: MlxSession, make_batch: MakeBatch, steps: int) -> list[Any]:
    return [
        session.train_step(make_batch(6, 24, seed=step, packed=True), lr=1e-2).result()
        for step in range(steps)
    ]


def test_compiled_equals_eager_bitwise(
    make_session: MakeSession, make_batch: MakeBatch, tiny_config: ModelConfig
) -> None:
    """Guards against fused kernels that round differently: a resume would depend on a setting."""
    model = tiny_config.model_copy(update={"intermediate_size": 128})  # large enough for codes
    optimizer = {"name": "muon", "state_bits": 8, "clip": "lagged", "clip_norm": 0.5}
    eager, compiled = (
        make_session(model, compile=on, micro_batch_size=4, **optimizer) for on in (False, True)
    )
    assert (eager.settings, compiled.settings) == ({"compile": False}, {"compile": True})
    assert train(compiled, make_batch, 4) == train(eager, make_batch, 4)
    require_same_state(state_of(compiled), state_of(eager), "compiled against eager")


@pytest.mark.parametrize("chunk", [16, 17, 100])
def test_chunked_loss_equals_the_whole(
    make_session: MakeSession, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Guards the seams between chunks, a short last one, and the sum of the head's gradients."""
    batch = replace(make_batch(4, 30, packed=True), token_weights=np.ones((4, 30), np.float32))
    batch.token_weights[1, :7] = 0.25
    session = make_session()
    whole, logprobs = session.gradients(batch), session.token_logprobs(batch)
    monkeypatch.setattr(loss, "chunk_tokens", lambda num_tokens, vocab_size: chunk)
    for name, gradient in session.gradients(batch).items():
        np.testing.assert_allclose(
            np.array(gradient), np.array(whole[name]), rtol=0, atol=1e-5, err_msg=name
        )
    np.testing.assert_allclose(session.token_logprobs(batch), logprobs, rtol=0, atol=1e-5)


def test_chunks_lower_the_peak_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against chunks whose logits are all kept until the end."""
    rng = np.random.default_rng(0)
    hidden, head = (mx.array(rng.standard_normal((n, 32)).astype(np.float32)) for n in (1024, 4096))
    labels, weights = mx.array(rng.integers(-1, 4096, 1024).astype(np.int32)), mx.ones(1024)
    peaks = []
    for rows in (1024, 64):
        monkeypatch.setattr(loss, "chunk_tokens", lambda num_tokens, vocab_size, rows=rows: rows)
        gradient: Any = mx.grad(lambda h, w: loss.summed_loss(h, w, labels, weights), (0, 1))
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradient(hidden, head))
        peaks.append(mx.get_peak_memory() - held)
    assert peaks[1] < 0.65 * peaks[0]


def peak_bytes(session: MlxSession, batch: Batch) -> int:
    """The peak of a step above what the session holds. Of seven steps the median: how far MLX runs
    ahead of the computation depends on the load, now and then in either direction."""
    session.train_step(batch, lr=1e-3).result()
    peaks = []
    for _ in range(7):
        state_of(session)
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        session.train_step(batch, lr=1e-3).result()
        peaks.append(int(mx.get_peak_memory() - held))
    return int(statistics.median(peaks))


@pytest.fixture
def deep(tiny_config: ModelConfig) -> ModelConfig:
    return tiny_config.model_copy(update={"num_hidden_layers": 6})


def test_four_micro_batches_peak_like_one(
    make_session: MakeSession, make_batch: MakeBatch, deep: ModelConfig
) -> None:
    """Guards against a graph over all micro-batches, which would hold the activations of all."""
    session = make_session(deep, micro_batch_size=2)
    one, four = (peak_bytes(session, make_batch(rows, 64)) for rows in (2, 8))
    assert four < 1.2 * one
    assert peak_bytes(make_session(deep), make_batch(8, 64)) > 2 * four, "a peak that sees nothing"


def test_checkpointing_lowers_the_peak(
    make_session: MakeSession, make_batch: MakeBatch, deep: ModelConfig
) -> None:
    """Guards against layers that are recomputed and kept all the same."""
    plain, frugal = (
        peak_bytes(make_session(deep, activation_checkpointing=on), make_batch(8, 64))
        for on in (False, True)
    )
    assert frugal < 0.6 * plain


def test_the_bound_of_a_step_forgets_the_update_before(
    make_session: MakeSession, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch,
    tiny_config: ModelConfig,
) -> None:  # fmt: skip
    """Guards the run-ahead's bound: taken while an update is under way it holds a state twice, and
    two steps in a row peak higher than one."""
    model = tiny_config.model_copy(update={"hidden_size": 256, "intermediate_size": 1024})
    session, batch = make_session(model), make_batch(1, 8)
    session.train_step(batch, lr=1e-3).result()
    bounds: list[int] = []
    set_limit = mx.set_memory_limit

    def noted(size: int) -> int:
        bounds.append(size)
        return int(set_limit(size))

    monkeypatch.setattr(mx, "set_memory_limit", noted)
    session.train_step(batch, lr=1e-3)
    session.train_step(batch, lr=1e-3).result()
    first, _, _, second, _, _ = bounds  # each step: set, set to the smaller one, set back
    assert second < first + (1 << 16)


def test_an_update_does_not_hold_the_state_twice(
    make_session: MakeSession, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch,
    tiny_config: ModelConfig,
) -> None:  # fmt: skip
    """Guards against one graph over all tensors: a model that fits would end in its first step."""
    model = tiny_config.model_copy(update={"hidden_size": 128, "intermediate_size": 512})
    batch = make_batch(1, 8)
    state_bytes = 12 * model.num_parameters()  # weights and two moments
    peaks = []
    for elements in (1, 1 << 22):
        monkeypatch.setattr("solollm_mlx.optim.GROUP_ELEMENTS", elements)
        monkeypatch.setattr("solollm_mlx.session.GROUP_ELEMENTS", elements)
        peaks.append(peak_bytes(make_session(model), batch))
    assert peaks[0] < state_bytes < peaks[1]


def test_lagged_clipping_uses_the_norm_before(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """Guards what `clip = "lagged"` means, and that the norm travels with the state."""
    session = make_session(clip="lagged", clip_norm=0.1, beta1=0.5)
    batch = make_batch(6, 24)
    first = session.train_step(batch, lr=0.0).result()
    assert session.session_state["lagged_norm"] == pytest.approx(first.grad_norm)
    name = "exp_avg.model.layers.0.mlp.up_proj.weight"
    gradient = np.array(session.gradients(batch)["model.layers.0.mlp.up_proj.weight"])
    unclipped = state_of(session).optimizer[name].data
    np.testing.assert_allclose(unclipped, 0.5 * gradient, rtol=1e-4, atol=1e-7)
    session.train_step(batch, lr=0.0).result()
    clipped = state_of(session).optimizer[name].data - 0.5 * unclipped
    factor = 0.1 / (first.grad_norm + 1e-6)
    np.testing.assert_allclose(clipped, 0.5 * factor * gradient, rtol=1e-4, atol=1e-7)


def test_a_handle_holds_no_graph(make_session: MakeSession, make_batch: MakeBatch) -> None:
    """Guards against metrics that are read late: they must be those of their own step."""
    late, prompt = make_session(), make_session()
    handles = [late.train_step(make_batch(4, 24, seed=seed), lr=1e-2) for seed in range(3)]
    expected = [
        prompt.train_step(make_batch(4, 24, seed=seed), lr=1e-2).result() for seed in range(3)
    ]
    assert [handle.result() for handle in reversed(handles)] == expected[::-1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(
    make_session: MakeSession, make_batch: MakeBatch, dtype: str
) -> None:
    """Guards the casts: masters, moments and losses stay fp32, and the loss scale cancels out."""
    batch = make_batch(2, 16)
    exact, half = make_session(), make_session(compute_dtype=dtype)
    expected, actual = exact.gradients(batch), half.gradients(batch)
    for name, gradient in actual.items():
        wanted = np.array(expected[name])
        assert gradient.dtype == mx.float32
        error = np.linalg.norm(np.array(gradient) - wanted)
        assert error < 0.05 * np.linalg.norm(wanted), name
    losses = [s.train_step(batch, lr=1e-2).result().loss for s in (exact, half)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)
    assert {t.dtype for t in state_of(half).parameters.values()} == {"F32"}


def test_an_fp16_overflow_is_skipped_and_halves_the_scale(
    make_session: MakeSession, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the loss scaler: a step that overflows must change no weight, and a scale that never
    grows again would lose small gradients for the rest of the run."""
    monkeypatch.setattr("solollm_mlx.session.SCALE_PATIENCE", 2)
    session, batch = make_session(compute_dtype="float16"), make_batch(2, 16)
    before = state_of(session)
    assert before.session_state["loss_scale"] == INITIAL_SCALE
    overflowing = replace(batch, denominator=batch.denominator * 1e-6)
    assert session.train_step(overflowing, lr=1e-2).result().skipped
    after = state_of(session)
    assert after.session_state == {
        "updates": 0, "lagged_norm": 0.0, "loss_scale": INITIAL_SCALE / 2, "scale_steps": 0,
    }  # fmt: skip
    require_same_state(replace(after, session_state=before.session_state), before, "skipped")
    for _ in range(2):
        assert not session.train_step(batch, lr=1e-2).result().skipped
    assert session.session_state["loss_scale"] == INITIAL_SCALE
    assert session.session_state["updates"] == 2


def test_a_state_without_a_loss_scale_starts_its_own(make_session: MakeSession) -> None:
    """Guards a run that comes from fp32, or from torch, into fp16: a scale of 1 would underflow."""
    plain, half = make_session(), make_session(compute_dtype="float16")
    assert "loss_scale" not in plain.session_state
    half.import_optimizer(DictSource(state_of(plain).optimizer), plain.session_state)
    assert half.session_state["loss_scale"] == INITIAL_SCALE
    plain.import_optimizer(DictSource(state_of(half).optimizer), half.session_state)
    assert set(plain.session_state) == {"updates", "lagged_norm"}


def test_states_of_another_dtype_are_refused(make_session: MakeSession) -> None:
    """Guards against moments that are rounded, or codes that are read as numbers."""
    session = make_session()
    tensors = dict(state_of(session).optimizer)
    name = "exp_avg.model.norm.weight"
    tensors[name] = HostTensor("BF16", tensors[name].shape, np.zeros(32, np.uint16))
    with pytest.raises(IntegrityError, match=f"{name} is BF16 instead of F32"):
        session.import_optimizer(DictSource(tensors), session.session_state)


def test_what_cannot_be_trained_is_refused(tiny_config: ModelConfig) -> None:
    """Guards settings that would otherwise have no effect."""
    plan, table = Plan(8, False, "float32", 64, 8), OptimizerTable(name="adamw")
    for options, message in (
        ({"compil": True}, "did you mean `compile`"),
        ({"compile": "maybe"}, "use auto, true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            MlxBackend().train_session(
                tiny_config, SessionOptions(table, backend_options=options), plan
            )


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a Linux box without g++: MLX would fail inside the first step."""
    if mx.default_device().type == mx.DeviceType.gpu:
        pytest.skip("a GPU needs no compiler on this machine")
    assert compiling.should_compile("auto")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.platform", "linux")
    assert not compiling.should_compile("auto")
    with pytest.warns(UserWarning, match="g\\+\\+"):
        assert not compiling.should_compile(True)
