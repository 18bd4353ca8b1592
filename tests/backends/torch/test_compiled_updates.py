"""One compiled pass over 8-bit moments against the same update operation by operation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from solollm_torch import compiled_updates
from solollm_torch.optim import Optimizer
from solollm_torch.split_master import join, split
from torch import Tensor

from solollm.architecture import ModelConfig, parameter_table
from solollm.config import OptimizerTable

NAME = "exp_avg.model.layers.0.mlp.up_proj.weight"
TABLE = OptimizerTable(name="adamw", state_bits=8)
MODEL = ModelConfig(
    vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=4, head_dim=16,
)  # fmt: skip


def drawn(step: int, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        spec.name: torch.randn(spec.shape, generator=generator) * scale
        for spec in parameter_table(MODEL)
    }


class Trained:
    """The weights of a model after a few updates, with split masters or fp32 ones."""

    def __init__(self, *, compiles: bool, halves: bool) -> None:
        self.weights, self.residuals = drawn(99, 0.02), {}
        if halves:
            for name, weight in self.weights.items():
                high, low = (
                    torch.empty_like(weight, dtype=d) for d in (torch.bfloat16, torch.int16)
                )
                split(weight, high, low)
                self.weights[name], self.residuals[name] = high, low
        self.optimizer = Optimizer(
            self.weights, model=MODEL, table=TABLE, residuals=self.residuals
        )  # fmt: skip
        self.optimizer.compiles = compiles

    def step(self, index: int, found_inf: float | None = None) -> None:
        bad = None if found_inf is None else torch.tensor(found_inf)
        self.optimizer.step(
            drawn(index, 1e-3), lr=1e-3, updates=index, grad_scale=torch.tensor(0.5), found_inf=bad
        )

    def values(self) -> dict[str, Tensor]:
        if not self.residuals:
            return self.weights
        return {name: join(w, self.residuals[name]) for name, w in self.weights.items()}

    def states(self) -> dict[str, np.ndarray]:
        names = [name for name, _, _ in self.optimizer.specs()]
        return {name: self.optimizer.export(name).numpy().copy() for name in names}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """traced(backend): compiled by that backend of the compiler."""

    def choose(backend: str) -> None:
        compiled = torch.compile(
            compiled_updates._update, backend=backend, dynamic=True, fullgraph=True
        )
        monkeypatch.setattr(compiled_updates, "_compiled", lambda: compiled)

    return choose


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler itself
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # fmt: skip
@pytest.mark.parametrize("halves", [True, False], ids=["split", "float32"])
def test_compiled_and_single_operations_update_alike(
    traced: Callable[[str], None], backend: str, halves: bool
) -> None:
    """Another formula, another table or a block's neighbour's scale trains, and learns less."""
    traced(backend)
    ours, plain = (Trained(compiles=compiles, halves=halves) for compiles in (True, False))
    for index in range(4):
        ours.step(index)
        plain.step(index)
    for name, expected in plain.values().items():
        deviation = (ours.values()[name] - expected).abs().max()
        assert deviation < 2e-6, name  # of updates of 1e-3
    coded = 0
    for name, expected in plain.states().items():
        actual = ours.states()[name]
        if expected.dtype == np.uint8:
            gap = np.abs(actual.astype(int) - expected.astype(int))
            assert gap.max() <= 1, name
            assert gap.mean() < 1e-3, name
            coded += 1
        else:
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert coded == 2 * 7  # two moments of seven matrices; the embedding's are fp32


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_step_that_is_not_finite_changes_nothing(
    traced: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device decides, after the update has been queued."""
    traced("eager")
    monkeypatch.setattr("solollm_torch.optim.host_decides", lambda _: False)
    trained = Trained(compiles=True, halves=True)
    trained.step(0, found_inf=0.0)
    values = {name: value.clone() for name, value in trained.values().items()}
    states = trained.states()
    trained.step(1, found_inf=1.0)
    assert all(torch.equal(value, values[name]) for name, value in trained.values().items())
    assert all(np.array_equal(value, states[name]) for name, value in trained.states().items())
    trained.step(1, found_inf=0.0)
    assert not np.array_equal(
        trained.states()[NAME],
        states[NAME],
    )
