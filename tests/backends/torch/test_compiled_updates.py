"""One compiled pass over 8-bit moments against the same update operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch import compiled_updates, optim
from solollm_torch.compiled_updates import Numbers
from solollm_torch.offload import StreamingSession
from solollm_torch.optim import Optimizer
from solollm_torch.session import TorchSession
from solollm_torch.split_master import join, split
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import Batch, Plan, SessionOptions
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


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Any]]]:
    """The sizes of the inputs of every kernel that the compiler is asked for. It traces, and gives
    each input that is changed its place, as for a card; its code generation takes too long."""
    asked: list[list[Any]] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        found = [
            node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"
        ]
        asked.append([tuple(x.shape) for x in found if isinstance(x, Tensor)])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    compiled_updates._compiled.cache_clear()
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **how: original(function, **{**how, "backend": backend})
    )
    yield asked
    compiled_updates._compiled.cache_clear()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("clip", ["lagged", "exact"])
@pytest.mark.parametrize("kind", [StreamingSession, TorchSession])
def test_one_kernel_serves_all_matrices_of_a_session(
    monkeypatch: pytest.MonkeyPatch, make_batch: Callable[..., Batch], kernels: list[list[Any]],
    kind: type[TorchSession], clip: str,
) -> None:  # fmt: skip
    """A streamed block's state is one buffer of several dtypes, which the compiler refused; and
    every other place and size in it was compiled for anew, up to a limit that ends the run."""
    monkeypatch.setattr(optim, "host_decides", lambda _: False)  # as on a card
    monkeypatch.setattr(optim, "CHUNK_ELEMENTS", 1 << 12)  # matrices of several chunks, and rests
    model = MODEL.model_copy(
        update={"vocab_size": 512, "num_hidden_layers": 3, "intermediate_size": 320}
    )
    options = {"compile": False, "master": "split", "compiled_updates": True}
    if kind is StreamingSession:
        options |= {"offload": "streaming"}
    table = OptimizerTable(name="adamw", state_bits=8, clip=clip, clip_norm=0.5)
    session = kind(
        model, SessionOptions(table, backend_options=options), Plan(4, True, "float32", 64, 8),
        torch.device("cpu"),
    )  # fmt: skip
    for index in range(3):
        assert not session.train_step(make_batch(8, 64, seed=index), lr=1e-3).result().skipped
    assert len(kernels) == 1
    of_rows = [shape for shape in kernels[0] if len(shape) == 2]
    assert len(of_rows) == 5  # both halves, the gradient, both moments' codes
    for count, size in of_rows:
        assert isinstance(count, torch.SymInt)
        assert type(size) is int  # known to the compiler, which else keeps no row in registers


def test_numbers_of_a_step_are_not_copied_from_the_host() -> None:
    """The host would wait for everything that is queued on a card, once per unit of every step."""
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        numbers = Numbers.of(
            TABLE, torch.device("cpu"), lr=0.5, updates=1, grad_scale=None, found_inf=None
        )
    assert set(called) == {"aten.full.default"}
    expected = [0.5, 1 - 0.9**2, (1 - TABLE.beta2**2) ** 0.5, 1.0, 0.0]
    np.testing.assert_allclose(torch.stack(list(numbers)).numpy(), expected, rtol=1e-6)
