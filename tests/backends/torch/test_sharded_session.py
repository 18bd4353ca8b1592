"""FSDP2 in one process: what a backend must be, and what only this session does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch.backend import TorchBackend
from solollm_torch.sharded_optim import orthogonal_rows
from solollm_torch.sharded_session import ShardedSession
from solollm_torch.sharding import Part, local

from solollm.architecture import ModelConfig
from solollm.backend import Batch, DictSource, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.testing.bench import (
    TIED,
    UNTIED,
    lively_parameters,
    make_batch,
    require_same_state,
    state_of,
    train,
    with_denominator,
)
from solollm.testing.conformance import Case, cases

OFFLOAD = {"offload": "fsdp", "threads": 1}
# Adapters are refused here: they train in one process, on a base that fits it.
ALL = [c for c in cases(TorchBackend(), backend_options=OFFLOAD) if c.bench.adapter is None]


def is_quick(case: Case) -> bool:
    """Whether it is always run: FSDP2 costs a tiny model ten times its own arithmetic."""
    return case.bench.table.state_bits == 32 and case.bench.model == TIED


@pytest.mark.parametrize("case", [case for case in ALL if is_quick(case)], ids=str)
def test_conformance(case: Case) -> None:
    """What every backend must do, with every weight under FSDP2."""
    case.run()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL if not is_quick(case)], ids=str)
def test_conformance_of_the_other_variants(case: Case) -> None:
    """The same with a head of its own, and with states of 16 and 8 bits."""
    case.run()


def session_of(
    model: ModelConfig = TIED, options: dict[str, Any] | None = None, *,
    checkpointing: bool = False, dtype: Any = "float32", **optimizer: Any,
) -> Any:  # fmt: skip
    table = OptimizerTable.model_validate({"name": "adamw", **optimizer})
    plan = Plan(2, checkpointing, dtype, 24, 6)
    given = SessionOptions(table, backend_options={"threads": 1, **(options or {})})
    return TorchBackend().train_session(model, given, plan)


@pytest.mark.parametrize("clip", ["exact", "lagged"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_trains_as_the_plain_session_does(name: str, clip: str) -> None:
    """A tied head's gradient comes from the loss and from the embedding: one was dropped, or
    counted once per micro-batch."""
    plain, sharded = (
        session_of(TIED, options, name=name, clip=clip, checkpointing=bool(options))
        for options in ({}, OFFLOAD)
    )
    assert isinstance(sharded, ShardedSession)
    for session in (plain, sharded):  # of which every matrix matters
        session.import_parameters(DictSource(lively_parameters(TIED)))
    expected, found = (np.array(train(s, range(20)))[:, :2] for s in (plain, sharded))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_hooked_updates_are_those_of_an_update_at_the_end() -> None:
    """A block that is updated before its last gradient, or read by the backward pass after it. With
    clipping off both ways do the same."""
    lagged, exact = (
        session_of(UNTIED, OFFLOAD, clip=c, clip_norm=0.0) for c in ("lagged", "exact")
    )
    for session in (lagged, exact):
        train(session, range(4))
    states = [state_of(session) for session in (lagged, exact)]
    for name, tensor in states[0].parameters.items():
        np.testing.assert_array_equal(tensor.data, states[1].parameters[name].data, err_msg=name)


def test_a_lagged_step_without_a_finite_loss_changes_nothing() -> None:
    """The hooks would have updated every block before anybody looked."""
    session = session_of(TIED, {"master": "split", **OFFLOAD}, clip="lagged", state_bits=16)
    train(session, range(2))
    before = state_of(session)
    metrics = session.train_step(with_denominator(make_batch(), float("nan")), lr=1e-2).result()
    assert metrics.skipped
    assert not metrics.partial
    require_same_state(state_of(session), before, "after a skipped step")


def test_bf16_computes_as_the_plain_session_does(recwarn: pytest.WarningsRecorder) -> None:
    """Mixed precision that leaves a part in fp32, or hands the loss the wrong dtype. How far bf16
    strays from fp32 in eight steps of this rate depends on the processor: where the plain session
    strays further than 0.5%, this one may as far."""
    fp32, plain, sharded = (
        np.array(train(session_of(UNTIED, options, dtype=dtype), range(8)))[:, :2]
        for options, dtype in (({}, "float32"), ({}, "bfloat16"), (OFFLOAD, "bfloat16"))
    )
    np.testing.assert_allclose(sharded[0], plain[0], rtol=1e-5)
    assert abs(sharded[0, 0] / fp32[0, 0] - 1) > 1e-6
    strayed = np.abs(plain[:, 0] / fp32[:, 0] - 1).max()
    np.testing.assert_allclose(sharded[:, 0], fp32[:, 0], rtol=max(5e-3, strayed))


def chain_batches(count: int) -> list[Batch]:
    """Tokens of one random chain in which each has four successors: entropy 1.2 nats."""
    rng = np.random.default_rng(3)
    successors = rng.integers(0, TIED.vocab_size, (TIED.vocab_size, 4))
    batches = []
    for _ in range(count):
        tokens = np.zeros((6, 25), np.int32)
        tokens[:, 0] = rng.integers(0, TIED.vocab_size, 6)
        for position in range(1, 25):
            choice = rng.choice(4, 6, p=[0.6, 0.2, 0.1, 0.1])
            tokens[:, position] = successors[tokens[:, position - 1], choice]
        labels = tokens[:, 1:].copy()
        batches.append(Batch(tokens[:, :-1].copy(), labels, float(labels.size)))
    return batches


@pytest.mark.slow
def test_compact_mode_learns_as_float32_does() -> None:
    """bf16 weights without their residual, or moments rounded to the nearest, stop learning: their
    updates are smaller than half of the last bit."""
    batches, ends = chain_batches(300), []
    for options, bits in (({}, 32), ({"master": "split", **OFFLOAD}, 16)):
        session = session_of(TIED, options, clip="lagged", state_bits=bits)
        losses = [session.train_step(batch, lr=1e-3).result().loss for batch in batches]
        assert losses[0] > 4
        ends.append(np.mean(losses[-20:]))
    np.testing.assert_allclose(ends[1], ends[0], rtol=2e-3)


def test_a_snapshot_that_nobody_has_read_is_kept_when_training_goes_on() -> None:
    """It is live: what was read before and what is read after a step would be of two states."""
    session = session_of(TIED, OFFLOAD, clip="lagged")
    train(session, range(2))
    expected, snapshot = state_of(session), session.snapshot()
    assert snapshot.is_live
    stream = snapshot.parameters()
    found = {name: tensor.data.copy() for name, tensor in [next(stream)]}
    train(session, [2])
    found |= {name: tensor.data.copy() for name, tensor in stream}
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected.parameters[name].data, err_msg=name)
    snapshot.close()


def test_gradients_are_those_of_the_plain_session(
    make_batch: Callable[..., Batch],
) -> None:
    """Fused matrices: rows of k taken for v, an embedding's gradient without the head's."""
    batch = make_batch(6, 24, TIED.vocab_size, packed=True)
    expected, found = (session_of(TIED, options).gradients(batch) for options in ({}, OFFLOAD))
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) or 1.0
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * scale)


def test_weights_lie_on_the_host_and_shards_are_views() -> None:
    """A copy would be updated instead of the weight."""
    session = session_of(UNTIED, OFFLOAD)
    weight = session._decoder.layers[0].qkv_proj
    view = session._masters.weights["model.layers.0.self_attn.k_proj.weight"]
    assert view.device.type == "cpu"
    assert view.untyped_storage().data_ptr() == local(weight).untyped_storage().data_ptr()


def test_one_rank_orthogonalises_what_it_has() -> None:
    """Newton-Schulz of rows instead of the matrix leaves them far from orthogonal."""
    matrix = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    (rows,) = orthogonal_rows([matrix], [Part((8, 12), ((0, 8),), 0, 0)], torch.float32)
    singular = torch.linalg.svdvals(rows)
    assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.3
