"""Sessions whose masters are split or bfloat16: what crosses the seam, and how they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch.session import TorchSession

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import Batch, DictSource, HostTensor
from solollm.errors import ConfigError
from solollm.optim_codec import counter_bits, round_stochastically

MakeSession = Callable[..., TorchSession]
MakeBatch = Callable[..., Batch]


def options(master: str, **more: Any) -> dict[str, Any]:
    return {"backend_options": {"master": master, **more}}


def weights(session: TorchSession) -> dict[str, HostTensor]:
    return {n: t._replace(data=t.data.copy()) for n, t in session.snapshot().parameters()}


def bits_of(session: TorchSession) -> dict[str, bytes]:
    snapshot = session.snapshot()
    pairs = [*snapshot.parameters(), *snapshot.optimizer()]
    return {name: tensor.data.tobytes() for name, tensor in pairs}


def train(session: TorchSession, batch: Batch, steps: int) -> None:
    for _ in range(steps):
        session.train_step(batch, lr=3e-3).result()


def test_split_session_exports_the_float32_it_stands_for(
    make_session: MakeSession, tiny_config: ModelConfig
) -> None:
    """The checkpoint must hold the joined weight, or every save would lose 16 bits of it."""
    exported = weights(make_session(**options("split")))
    for name, array in initial_parameters(tiny_config, 0):
        assert exported[name].dtype == "F32"
        np.testing.assert_array_equal(exported[name].data, array, err_msg=name)


@pytest.mark.parametrize(("name", "bits"), [("adamw", 8), ("adamw", 16), ("muon", 8), ("muon", 32)])
@pytest.mark.parametrize("master", ["split", "bfloat16"])
def test_resumed_equals_undisturbed(
    make_session: MakeSession, make_batch: MakeBatch, master: str, name: str, bits: int
) -> None:
    """A residual, or the position in the random stream, left out of a checkpoint."""
    batch, table = make_batch(8, 64), {"name": name, "state_bits": bits}
    straight, first = (make_session(**options(master), **table) for _ in range(2))
    train(straight, batch, 4)
    train(first, batch, 2)
    snapshot = first.snapshot()
    resumed = make_session(backend_options=dict(first.settings), **table)
    resumed.import_parameters(DictSource.collect(snapshot.parameters()))
    resumed.import_optimizer(DictSource.collect(snapshot.optimizer()), snapshot.session_state)
    train(resumed, batch, 2)
    assert bits_of(resumed) == bits_of(straight)


def test_bfloat16_update_is_the_float32_update_rounded_by_the_counter(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """Rounding to the nearest loses every update below half a step of bfloat16."""
    batch = make_batch(8, 64)
    narrow = make_session(**options("bfloat16"), clip_norm=0)
    wide = make_session(**options("split"), clip_norm=0)
    wide.import_parameters(DictSource.collect(narrow.snapshot().parameters()))
    before = weights(narrow)
    narrow.train_step(batch, lr=1e-4).result()
    wide.train_step(batch, lr=1e-4).result()
    after, exact = weights(narrow), weights(wide)
    for name, tensor in after.items():
        assert tensor.dtype == "BF16"
        random = counter_bits(0, 0, name, tensor.data.size).reshape(tensor.shape)
        expected = round_stochastically(exact[name].data, random)
        np.testing.assert_array_equal(tensor.data, expected, err_msg=name)
    name = "model.layers.0.mlp.up_proj.weight"
    nearest = torch.from_numpy(exact[name].data).to(torch.bfloat16).view(torch.int16)
    moved = (after[name].data != before[name].data).mean()
    still = (nearest.numpy().view(np.uint16) != before[name].data).mean()
    assert moved > 1.5 * still, "the rounding is not stochastic"


@pytest.mark.parametrize("master", ["split", "bfloat16"])
def test_gradients_are_those_of_the_same_weights_in_float32(
    make_session: MakeSession, make_batch: MakeBatch, master: str
) -> None:
    """The embedding's gradient added up in bfloat16, or a weight's rounded on its way."""
    batch = make_batch(8, 64)
    narrow, plain = make_session(**options(master), micro_batch_size=3), make_session()
    train(narrow, batch, 2)
    rounded = {name: p.float() for name, p in narrow._decoder.masters().items()}
    for name, weight in plain._decoder.masters().items():
        weight.copy_(rounded[name])
    expected = plain.gradients(batch)
    for name, gradient in narrow.gradients(batch).items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_bfloat16_gradients_are_near_those_of_float32(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """Half the memory of gradients, for their rounding: 0.4% of each micro-batch's share."""
    batch = make_batch(8, 64)
    wide = make_session(**options("split"), micro_batch_size=2)
    narrow = make_session(**options("split", gradients="bfloat16"), micro_batch_size=2)
    train(wide, batch, 2)  # output projections begin at zero, and with them most gradients
    narrow.import_parameters(DictSource.collect(wide.snapshot().parameters()))
    expected = wide.gradients(batch)
    for name, gradient in narrow.gradients(batch).items():
        assert gradient.dtype == torch.bfloat16
        error = (gradient.float() - expected[name]).norm() / expected[name].norm()
        assert 0 < error < 0.01, name


def test_unusable_options_are_refused(make_session: MakeSession) -> None:
    """A misspelt option must not train quietly without its effect."""
    for bad in ({"master": "fp8"}, {"gradients": "int8"}, {"gradients": "bfloat16"}):
        with pytest.raises(ConfigError):
            make_session(backend_options=bad)


def loss_after(make_session: MakeSession, make_batch: MakeBatch, steps: int, **how: Any) -> float:
    """Mean loss of the last 20 steps on ever new batches of a learnable rule."""
    session, losses = make_session(**how), []
    for step in range(steps):
        generator = np.random.default_rng(step)
        start, stride = generator.integers(0, 192, (8, 1)), generator.integers(1, 4, (8, 1))
        ids = ((start + stride * np.arange(65)) % 192).astype(np.int32)
        batch = Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), 512.0)
        losses.append(session.train_step(batch, lr=1e-3).result().loss)
    return float(np.mean(losses[-20:]))


@pytest.mark.slow
def test_split_master_trains_as_float32_does(
    make_session: MakeSession, make_batch: MakeBatch
) -> None:
    """Over 300 steps: the forward pass sees bf16 weights, the update the exact ones."""
    expected = loss_after(make_session, make_batch, 300)
    split = loss_after(make_session, make_batch, 300, **options("split"))
    np.testing.assert_allclose(split, expected, rtol=0.01)
