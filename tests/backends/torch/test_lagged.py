"""Updates inside the backward pass: the same arithmetic, in the order of the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch import optim
from solollm_torch.optim import Optimizer
from solollm_torch.session import TorchSession

from solollm.architecture import ModelConfig, initial_parameters, parameter_table
from solollm.backend import Batch
from solollm.config import OptimizerTable

MakeSession = Callable[..., TorchSession]
MakeBatch = Callable[..., Batch]


def bits_of(session: TorchSession) -> dict[str, bytes]:
    snapshot = session.snapshot()
    pairs = [*snapshot.parameters(), *snapshot.optimizer()]
    return {name: tensor.data.tobytes() for name, tensor in pairs}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_clipping_lagged_equals_exact(
    make_session: MakeSession,
    make_batch: MakeBatch,
    tiny_config: ModelConfig,
    *,
    tied: bool,
    checkpointing: bool,
    name: str,
) -> None:
    """A block updated before its last gradient, or before a block below has used it."""
    model = tiny_config.model_copy(update={"tie_word_embeddings": tied})
    common: dict[str, Any] = {
        "name": name, "clip_norm": 0, "micro_batch_size": 3, "backend_options": {"master": "split"},
        "activation_checkpointing": checkpointing,
    }  # fmt: skip
    lagged = make_session(model, clip="lagged", **common)
    exact = make_session(model, clip="exact", **common)
    for index in range(3):
        batch = make_batch(8, 64, seed=index, packed=index == 1)
        assert (
            lagged.train_step(batch, lr=3e-3).result() == exact.train_step(batch, lr=3e-3).result()
        )
    assert bits_of(lagged) == bits_of(exact)


def test_updates_come_in_the_order_of_the_backward_pass(
    make_session: MakeSession, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates that all wait for the end overlap with nothing."""
    session = make_session(clip="lagged")
    last = session._model.num_hidden_layers - 1
    seen: list[tuple[str, float]] = []
    step = Optimizer.step

    def watch(self: Optimizer, gradients: Any, **how: Any) -> None:
        below = session._decoder.layers[0].down_proj.grad
        seen.append((next(iter(self._parameters)), float(below.abs().sum())))
        step(self, gradients, **how)

    monkeypatch.setattr(Optimizer, "step", watch)
    session.train_step(make_batch(8, 64), lr=1e-3).result()
    blocks = [f"model.layers.{i}.input_layernorm.weight" for i in range(last, -1, -1)]
    order = ["model.norm.weight", *blocks, "model.embed_tokens.weight"]
    assert [name for name, _ in seen] == order
    assert all(gradient == 0 for name, gradient in seen if name in order[:2])


def unstable_session(make_session: MakeSession, **how: Any) -> TorchSession:
    """A finite loss whose gradient overflows in block 0 alone: what block 0 attends to is zero, and
    its output projection multiplies that, and the gradient, by 1e38."""
    session = make_session(**how)
    weights = session._decoder.masters()
    weights["model.layers.0.self_attn.v_proj.weight"].zero_()
    weights["model.layers.0.self_attn.o_proj.weight"].fill_(1e38)
    return session


def test_non_finite_block_is_not_updated_and_the_step_says_partial(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """Blocks above have been updated by then: who goes on from here trains a mixture."""
    session = unstable_session(make_session, clip="lagged")
    before = bits_of(session)
    metrics = session.train_step(make_batch(8, 64), lr=1e-3).result()
    assert np.isfinite(metrics.loss)
    assert metrics.skipped
    assert metrics.partial
    changed = {name for name, bits in bits_of(session).items() if bits != before[name]}
    assert changed
    assert not {n for n in changed if ".layers.0." in n or "embed_tokens" in n}
    assert session.session_state["updates"] == 0


def test_exact_clipping_skips_the_same_step_whole(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """The update waits for the last gradient, so nothing has happened yet."""
    session = unstable_session(make_session, clip="exact")
    before = bits_of(session)
    metrics = session.train_step(make_batch(8, 64), lr=1e-3).result()
    assert metrics.skipped
    assert not metrics.partial
    assert bits_of(session) == before


def test_non_finite_loss_updates_nothing(make_session: MakeSession, make_batch: MakeBatch) -> None:
    """The loss is known before the first update: such a step is whole, and nothing to roll back."""
    session = make_session(clip="lagged")
    batch = make_batch(8, 64)
    session.train_step(batch, lr=1e-3).result()
    before = bits_of(session)
    broken = Batch(batch.input_ids, batch.labels, float("nan"))
    metrics = session.train_step(broken, lr=1e-3).result()
    assert metrics.skipped
    assert not metrics.partial
    assert bits_of(session) == before


@pytest.mark.parametrize("master", ["float32", "split", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_the_device_can_leave_a_unit_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig, master: str, name: str, bits: int
) -> None:
    """On a card nobody waits to hear whether gradients are finite: decoding and encoding again must
    then change no bit. The CPU, which can read the flag, is made to do as a card does."""
    dtype = torch.float32 if master == "float32" else torch.bfloat16
    arrays = dict(initial_parameters(tiny_config, 0))
    weights = {n: torch.from_numpy(a).to(dtype) for n, a in arrays.items()}
    residuals = {n: torch.ones(w.shape, dtype=torch.int16) for n, w in weights.items()}
    table = OptimizerTable.model_validate({"name": name, "state_bits": bits})
    optimizer = Optimizer(
        weights, model=tiny_config, table=table, residuals=residuals if master == "split" else None
    )
    generator = torch.Generator().manual_seed(0)

    def gradients() -> dict[str, torch.Tensor]:
        specs = parameter_table(tiny_config)
        return {s.name: torch.randn(s.shape, generator=generator) for s in specs}

    def state() -> list[torch.Tensor]:
        held = [optimizer.export(name) for name, _, _ in optimizer.specs()]
        return [t.clone() for t in (*weights.values(), *residuals.values(), *held)]

    optimizer.step(gradients(), lr=1e-3, updates=0)
    before, poisoned = state(), {n: g.fill_(torch.nan) for n, g in gradients().items()}
    monkeypatch.setattr(optim, "host_decides", lambda found_inf: False)
    optimizer.step(poisoned, lr=1e-3, updates=1, found_inf=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    optimizer.step(gradients(), lr=1e-3, updates=1, found_inf=torch.tensor(0.0))
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], state()[:3], strict=True))
