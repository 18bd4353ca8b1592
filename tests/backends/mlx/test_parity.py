"""MLX against torch, in fp32: the same logits, gradients and updates from the same weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("torch", reason="these tests compare with torch")
import mlx.core as mx
import torch
from solollm_mlx import model as mlx_model
from solollm_mlx.optim import Optimizer as MlxOptimizer
from solollm_mlx.optim import Step
from solollm_mlx.session import MlxSession
from solollm_mlx.state import from_host
from solollm_torch.attention import Segments
from solollm_torch.model import Decoder
from solollm_torch.optim import Optimizer as TorchOptimizer
from solollm_torch.session import TorchSession

from solollm.architecture import ModelConfig, initial_parameters, parameter_table
from solollm.backend import Batch, DictSource, Plan, SessionOptions
from solollm.config import OptimizerTable, ScheduleTable
from solollm.schedule import lr_at
from solollm.testing.bench import lively_parameters

MakeBatch = Callable[..., Batch]
MakeSession = Callable[..., MlxSession]
STEPS = 60


def torch_session(model: ModelConfig, **optimizer: object) -> TorchSession:
    table = OptimizerTable.model_validate({"name": "adamw", **optimizer})
    options = SessionOptions(table, backend_options={"compile": False})
    plan = Plan(8, False, "float32", 64, 8)
    session = TorchSession(model, options, plan, torch.device("cpu"))
    session.import_parameters(DictSource(lively_parameters(model)))
    return session


@pytest.mark.parametrize("length", [40, 300], ids=["whole", "blocked"])
def test_logits_equal_torch(variant: ModelConfig, make_batch: MakeBatch, length: int) -> None:
    """Guards theta, rope scaling, norms, grouping, the tied head and document masks."""
    batch = make_batch(2, length, packed=True)
    weights = lively_parameters(variant)
    decoder = Decoder(variant)
    decoder.load((name, torch.from_numpy(host.data)) for name, host in weights.items())
    segments = Segments.of(batch.segment_ids, torch.device("cpu"))
    expected = decoder.logits(torch.from_numpy(batch.input_ids).long(), segments).detach().numpy()
    logits = mlx_model.logits(
        {name: from_host(host) for name, host in weights.items()},
        mx.array(batch.input_ids), mx.array(batch.segment_ids), config=variant,
    )  # fmt: skip
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.array(logits), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("length", [40, 300], ids=["whole", "blocked"])
def test_gradients_equal_torch(
    variant: ModelConfig, make_batch: MakeBatch, make_session: MakeSession, length: int
) -> None:
    """Guards the loss's own gradient, attention in blocks, and both uses of a tied head."""
    batch = make_batch(3, length, packed=True)
    session = make_session(variant, micro_batch_size=2)
    expected = torch_session(variant).gradients(batch)
    gradients = session.gradients(batch)
    assert list(gradients) == list(expected), "not in table order"
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        np.testing.assert_allclose(
            np.array(gradient), expected[name].numpy(), rtol=0, atol=1e-5 * scale, err_msg=name
        )


def recorded_gradients(model: ModelConfig, make_batch: MakeBatch) -> list[dict[str, np.ndarray]]:
    """What a run in torch meets in its first steps."""
    session, recorded = torch_session(model, lr=3e-3), []
    for step in range(STEPS):
        batch = make_batch(4, 24, seed=step % 8)
        recorded.append({n: g.numpy() for n, g in session.gradients(batch).items()})
        session.train_step(batch, lr=3e-3).result()
    return recorded


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-6), ("muon", 1e-5)])
def test_sixty_recorded_gradients_give_torchs_weights(
    tiny_config: ModelConfig, make_batch: MakeBatch, name: str, tolerance: float
) -> None:
    """Guards bias correction, decay groups, the place of eps, momentum's warm-up and Muon's scale:
    what no single step shows."""
    table = OptimizerTable.model_validate({"name": name, "momentum_warmup_steps": 20})
    initial = dict(initial_parameters(tiny_config, 0))
    theirs = {n: torch.from_numpy(array.copy()) for n, array in initial.items()}
    reference = TorchOptimizer(theirs, model=tiny_config, table=table)
    weights = {n: mx.array(array) for n, array in initial.items()}
    optimizer = MlxOptimizer(parameter_table(tiny_config), table, compiled=False)
    states = optimizer.initial_states()
    for step, gradients in enumerate(recorded_gradients(tiny_config, make_batch)):
        lr = lr_at(step, total_steps=STEPS, peak_lr=3e-3, table=ScheduleTable(name="cosine"))
        of_mlx = {n: mx.array(g) for n, g in gradients.items()}
        optimizer.step(weights, states, of_mlx, Step.of(lr, table, updates=mx.array(step)))
        mx.eval(weights, states)
        of_torch = {n: torch.from_numpy(g.copy()) for n, g in gradients.items()}
        reference.step(of_torch, lr=lr, updates=step)
    moved = max(np.abs(theirs[n].numpy() - array).max() for n, array in initial.items())
    assert moved > 0.05, "the comparison must cover real updates"
    for key, weight in weights.items():
        np.testing.assert_allclose(
            np.array(weight), theirs[key].numpy(), rtol=0, atol=tolerance, err_msg=key
        )
