"""Narrow copies in compiled blocks, beside the compiler's own narrowing: the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from solollm_torch import compiling, session
from solollm_torch.loss import _gradient_in_place
from solollm_torch.model import Block
from solollm_torch.narrowed import NarrowedWeights
from solollm_torch.session import TorchSession

from solollm.backend import Batch, DictSource, EngineOptions

MakeSession = Callable[..., TorchSession]
MakeBatch = Callable[..., Batch]


@pytest.fixture
def make_compiled(monkeypatch: pytest.MonkeyPatch, make_session: MakeSession) -> MakeSession:
    """Sessions whose blocks and loss the compiler traces, differentiates and partitions, without
    its code generation, which takes minutes."""

    def compile_blocks(blocks: Iterable[Block], *, cuda_graphs: bool) -> None:
        for block in blocks:
            block.compile(backend="aot_eager_decomp_partition")

    monkeypatch.setattr(session, "compile_blocks", compile_blocks)
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: "")
    monkeypatch.setattr("solollm_torch.loss._compiled", lambda: _gradient_in_place)

    def make(*, narrowed: bool = True, **options: Any) -> TorchSession:
        with monkeypatch.context() as patch:
            if not narrowed:
                patch.setattr(session, "narrow_blocks", lambda decoder: NarrowedWeights())
            return make_session(
                compute_dtype="bfloat16", micro_batch_size=4, backend_options={"compile": True},
                **options,
            )  # fmt: skip

    return make


def bits_of(session: TorchSession) -> dict[str, bytes]:
    snapshot = session.snapshot()
    pairs = [*snapshot.parameters(), *snapshot.optimizer()]
    return {name: tensor.data.tobytes() for name, tensor in pairs}


# The compiler's own, while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.mark.parametrize("clip", ["exact", "lagged"])
def test_bits_are_those_of_blocks_that_narrow_for_themselves(
    make_compiled: MakeSession, make_batch: MakeBatch, clip: str
) -> None:
    """Weights of the step before, a gradient added twice or not at all, one rounded again."""
    narrowed, plain = (make_compiled(narrowed=n, clip=clip, clip_norm=0.5) for n in (True, False))
    matrices = 4 * len(narrowed._decoder.layers)
    assert [len(s._narrowed.matrices) for s in (narrowed, plain)] == [matrices, 0]
    for index in range(4):
        batch = make_batch(8, 64, seed=index, packed=index == 1)
        results = [s.train_step(batch, lr=1e-2).result() for s in (narrowed, plain)]
        assert results[0] == results[1]
    assert bits_of(narrowed) == bits_of(plain)
    assert narrowed.eval_step(batch) == plain.eval_step(batch)


def test_a_step_that_is_skipped_for_its_numbers_leaves_both_alike(
    make_compiled: MakeSession, make_batch: MakeBatch
) -> None:
    """Lagged updates made before the bad unit came are in the masters; copies must have them."""
    trained = make_compiled(clip="lagged")
    below = trained._decoder.layers[0].down_proj
    hook = below.register_hook(lambda gradient: gradient * float("nan"))  # type: ignore[no-untyped-call]
    metrics = trained.train_step(make_batch(8, 64), lr=1e-2).result()
    hook.remove()
    assert metrics.skipped
    assert metrics.partial
    for _, _, wide, narrow in trained._narrowed.matrices:
        assert torch.equal(wide.bfloat16(), narrow)


def test_weights_taken_over_are_computed_with(
    make_compiled: MakeSession, make_batch: MakeBatch
) -> None:
    """A resume that goes on from the initial weights for one step."""
    batch, first, second = make_batch(8, 64), make_compiled(), make_compiled(seed=5)
    first.train_step(batch, lr=1e-2).result()
    second.import_parameters(DictSource.collect(first.snapshot().parameters()))
    assert second.eval_step(batch) == first.eval_step(batch)


def test_an_engine_has_the_masters(make_compiled: MakeSession, make_batch: MakeBatch) -> None:
    """Samples of a run in float32 from weights that were rounded to bfloat16."""
    trained = make_compiled()
    trained.train_step(make_batch(8, 64), lr=1e-2).result()
    engine: Any = trained.engine(EngineOptions(compute_dtype="float32"))
    for index, layer in enumerate(engine.inference._layers):
        master = trained._masters.weights[f"model.layers.{index}.mlp.down_proj.weight"]
        found = layer.down_proj(torch.eye(master.shape[1])).t()
        torch.testing.assert_close(found, master, rtol=1e-6, atol=1e-7)
    assert trained._decoder.layers[0].down_proj.dtype == torch.bfloat16


def test_blocks_that_are_recomputed_keep_no_copies(
    make_compiled: MakeSession, make_batch: MakeBatch
) -> None:
    """A small card recomputes because it is full."""
    trained = make_compiled(activation_checkpointing=True)
    assert trained._narrowed.matrices == []
    assert trained.train_step(make_batch(8, 64), lr=1e-2).result().loss > 0
