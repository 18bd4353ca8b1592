"""The streaming session against the resident one, bit for bit; its bytes, snapshots and memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch import offload, optim
from solollm_torch.backend import TorchBackend
from solollm_torch.lanes import CpuLanes
from solollm_torch.offload import StreamingSession
from solollm_torch.session import TorchSession
from solollm_torch.traffic import Streaming, device_bytes, host_bytes, step_traffic

from solollm.architecture import ModelConfig
from solollm.backend import Batch, DictSource, HostTensor, Plan, SessionOptions, TrainSession
from solollm.config import OptimizerTable
from solollm.errors import BackendError, ConfigError
from solollm.testing import conformance_engine, conformance_training
from solollm.testing.bench import Bench, lively_parameters
from solollm.testing.conformance import Case, cases

MakeBatch = Callable[..., Batch]
Make = Callable[..., TorchSession]
OPTIONS = {"compile": False, "offload": "streaming"}
OF_MODEL = (*conformance_training.MODEL_CHECKS, *conformance_engine.CHECKS)


def is_usual(case: Case) -> bool:
    """The checks of the model, and those of the state with 8-bit AdamW; the rest is slow."""
    return case.check in OF_MODEL or str(case.bench).endswith("adamw-8bit")


CASES = [
    pytest.param(c, id=str(c), marks=[] if is_usual(c) else [pytest.mark.slow])
    for c in cases(TorchBackend(), backend_options=OPTIONS)
    if c.bench.adapter is None  # which do not stream, and say so
]


class WeightsOfBfloat16(Bench):
    """A split master computes with its bf16 half, so that a session and the checkpoint of all of
    its bits agree to rounding only where weights are such as bf16 holds."""

    def lively_session(self, *, micro_batch_size: int = 4) -> TrainSession:
        session = self.session(micro_batch_size=micro_batch_size)
        bits = {
            name: HostTensor("BF16", t.shape, (t.data.view(np.uint32) >> 16).astype(np.uint16))
            for name, t in lively_parameters(self.model).items()
        }
        session.import_parameters(DictSource(bits))
        return session


@pytest.mark.parametrize("case", CASES)
def test_conformance(case: Case) -> None:
    """See the docstring of the check that the case names."""
    bench = WeightsOfBfloat16(**{f.name: getattr(case.bench, f.name) for f in fields(case.bench)})
    replace(case, bench=bench).run()


@pytest.fixture
def model(tiny_config: ModelConfig) -> ModelConfig:
    """Four blocks, so that they outnumber the slots."""
    return tiny_config.model_copy(update={"num_hidden_layers": 4})


@pytest.fixture
def make(model: ModelConfig) -> Make:
    """make(kind, **table): a resident session (TorchSession) or a streaming one."""

    def build(
        kind: type[TorchSession] = StreamingSession,
        *,
        tied: bool = False,
        recompute: bool = True,
        micro_batch_size: int = 3,
        compute_dtype: Any = "float32",
        options: dict[str, Any] | None = None,
        **table: Any,
    ) -> TorchSession:
        given = {"compile": False, "master": "split", **(options or {})}
        if kind is TorchSession:
            given = {k: v for k, v in given.items() if k not in ("slots", "offload_residuals")}
        session_options = SessionOptions(
            OptimizerTable.model_validate({"name": "adamw", "state_bits": 8, **table}),
            backend_options=given,
        )
        plan = Plan(micro_batch_size, recompute, compute_dtype, 64, 8)
        config = model.model_copy(update={"tie_word_embeddings": tied})
        return kind(config, session_options, plan, torch.device("cpu"))

    return build


def contents(session: TorchSession) -> dict[str, HostTensor]:
    snapshot = session.snapshot()
    pairs = [*snapshot.parameters(), *snapshot.optimizer()]
    copied = {name: t._replace(data=t.data.copy()) for name, t in pairs}
    snapshot.close()
    return copied


def assert_same_bits(actual: TorchSession, expected: TorchSession) -> None:
    ours, theirs = contents(actual), contents(expected)
    assert list(ours) == list(theirs)
    assert [n for n in theirs if not np.array_equal(ours[n].data, theirs[n].data)] == []
    assert actual.session_state == expected.session_state


VARIANTS: dict[str, dict[str, Any]] = {
    "adamw, 8 bits": {},
    "muon, 8 bits, tied": {"name": "muon", "tied": True},
    "adamw, 16 bits": {"state_bits": 16},
    "muon, 32 bits, bf16 masters": {
        "name": "muon", "state_bits": 32, "options": {"master": "bfloat16"},
    },
    "adamw, 8 bits, bf16 masters, tied": {"tied": True, "options": {"master": "bfloat16"}},
    "bf16 arithmetic and gradients": {"compute_dtype": "bfloat16"},
    "nothing recomputed": {"recompute": False},
    "three slots": {"options": {"slots": 3}},
    "a slot for every block": {"options": {"slots": 4}},
    "residuals on the host": {"options": {"offload_residuals": True}},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("clip", ["exact", "lagged"])
def test_streaming_equals_resident_bit_for_bit(
    make: Make, make_batch: MakeBatch, variant: str, clip: str
) -> None:
    """A block computed with another's weights, a gradient added to another's, an update on a state
    that has not arrived or goes back to the wrong place."""
    how = {"clip": clip, "clip_norm": 0.7, **VARIANTS[variant]}
    streaming, resident = make(**how), make(TorchSession, **how)
    for index in range(4):
        batch = make_batch(8, 64, seed=index, packed=index == 1)
        actual = streaming.train_step(batch, lr=3e-3).result()
        assert actual == resident.train_step(batch, lr=3e-3).result()
        assert streaming.eval_step(batch) == resident.eval_step(batch)
    assert actual.grad_norm > 0.7, "clipping must have had something to do"
    assert_same_bits(streaming, resident)


def test_stretches_of_the_ends_equal_whole_updates(
    make: Make, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedding and head pass through the slots in parts: an element lost or drawn anew between
    them shows only in vocabularies of more than 512k elements, unless chunks are small."""
    monkeypatch.setattr(optim, "CHUNK_ELEMENTS", 1024)
    how: dict[str, Any] = {"options": {"master": "bfloat16"}, "state_bits": 16}
    streaming, resident = make(**how), make(TorchSession, **how)
    for index in range(3):
        for session in (streaming, resident):
            session.train_step(make_batch(8, 64, seed=index), lr=3e-3).result()
    assert_same_bits(streaming, resident)


@pytest.mark.parametrize("layers", [2, 3, 4, 7])
@pytest.mark.parametrize("clip", ["exact", "lagged"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_bytes_moved_equal_the_formula(
    make_batch: MakeBatch, tiny_config: ModelConfig, *, layers: int, clip: str, offloaded: bool
) -> None:
    """The planner's hours on a slow link are made of this formula."""
    model = tiny_config.model_copy(update={"num_hidden_layers": layers})
    table = OptimizerTable.model_validate({"name": "adamw", "state_bits": 8, "clip": clip})
    given = {"compile": False, "offload_residuals": offloaded}
    session = StreamingSession(
        model, SessionOptions(table, backend_options=given), Plan(3, True, "float32", 64, 8),
        torch.device("cpu"),
    )  # fmt: skip
    expected = step_traffic(
        model, table, Streaming("split", 2, offloaded), num_micro_batches=3,
        residual_bytes=8 * 64 * model.hidden_size * 4,
    )  # fmt: skip
    for index in range(3):
        session.train_step(make_batch(8, 64, seed=index), lr=1e-3).result()
        assert session.traffic == expected
        session.eval_step(make_batch(8, 64))


@pytest.mark.parametrize(("master", "expected"), [("split", 6.0), ("bfloat16", 4.0)])
def test_a_block_takes_so_many_bytes_per_parameter(master: Any, expected: float) -> None:
    """6 GB of pinned memory per billion parameters, or 4: what fits where is made of it."""
    model = ModelConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1408, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    table = OptimizerTable(name="adamw", state_bits=8)
    per_block = host_bytes(model, table, master) - host_bytes(
        model.model_copy(update={"num_hidden_layers": 1}), table, master
    )
    parameters = 4 * 512 * 512 + 3 * 512 * 1408
    assert expected < per_block / parameters < expected + 0.05


def test_host_bytes_are_those_allocated(make: Make, model: ModelConfig) -> None:
    """What the planner counts against the machine's memory."""
    session = make()
    assert isinstance(session, StreamingSession)
    blocks = [*session._host.block_weights, *session._host.block_updates]
    ends = sum(
        t.nbytes for name, t in [*session._host.masters.weights.items(),
                                 *session._host.masters.residuals.items(),
                                 *session._host.states.items()] if ".layers." not in name
    )  # fmt: skip
    counted = sum(b.nbytes for b in blocks) + ends
    assert counted == host_bytes(model, OptimizerTable(name="adamw", state_bits=8), "split")


def test_device_bytes_are_those_allocated(
    make: Make, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the planner counts against the card's memory."""
    allocated: list[int] = []

    class Counted(CpuLanes):
        def device_buffer(self, num_bytes: int) -> torch.Tensor:
            allocated.append(num_bytes)
            return super().device_buffer(num_bytes)

    monkeypatch.setattr(offload, "lanes_for", lambda device: Counted())
    session = make()
    table = OptimizerTable(name="adamw", state_bits=8)
    counted = device_bytes(
        model, table, Streaming(), gradient_item=4, chunk=optim.chunk_elements(torch.device("cpu"))
    )
    assert sum(allocated) == counted["weight slots"] + counted["update slots"]
    held = sum(p.nbytes for p in session._decoder.parameters())
    assert held == counted["embedding, norm, head"]
    gradients = sum(gradient.nbytes for gradient in session._gradients.values())
    assert gradients == counted["gradients"]


def test_device_holds_two_blocks_and_no_state(
    make: Make, make_batch: MakeBatch, model: ModelConfig, live_bytes: Any
) -> None:
    """What a card must hold does not grow with the number of blocks, but for gradients and, unless
    they leave too, block inputs."""
    peaks = []
    for layers in (4, 8):
        deep = model.model_copy(update={"num_hidden_layers": layers})
        table = OptimizerTable(name="adamw", state_bits=8)
        options = SessionOptions(table, backend_options={"offload_residuals": True})
        plan = Plan(8, True, "float32", 64, 8)
        session = StreamingSession(deep, options, plan, torch.device("cpu"))
        session.train_step(make_batch(8, 64), lr=1e-3).result()
        with live_bytes() as watch:
            session.train_step(make_batch(8, 64, seed=1), lr=1e-3).result()
        peaks.append(watch.peak)
    assert peaks[1] < 1.02 * peaks[0]


def test_non_finite_steps_are_as_on_the_resident_session(make: Make, make_batch: MakeBatch) -> None:
    """A skipped step must leave host and device alike."""
    batch = make_batch(8, 64)
    broken = Batch(batch.input_ids, batch.labels, float("nan"))
    for clip in ("exact", "lagged"):
        streaming, resident = make(clip=clip), make(TorchSession, clip=clip)
        for step in (batch, broken, batch):
            metrics = streaming.train_step(step, lr=3e-3).result()
            expected = resident.train_step(step, lr=3e-3).result()
            np.testing.assert_array_equal(metrics, expected)
        assert_same_bits(streaming, resident)


@pytest.mark.parametrize("clip", ["exact", "lagged"])
def test_state_moves_between_streaming_and_resident(
    make: Make, make_batch: MakeBatch, clip: str
) -> None:
    """One checkpoint format: a run may leave the small card for a large one, and come back."""
    straight, first = make(clip=clip), make(clip=clip)
    batches = [make_batch(8, 64, seed=index) for index in range(4)]
    for batch in batches:
        straight.train_step(batch, lr=3e-3).result()
    for batch, kind in zip(
        batches, (None, TorchSession, StreamingSession, TorchSession), strict=True
    ):
        if kind is not None:
            snapshot, second = first.snapshot(), make(kind, clip=clip)
            second.import_parameters(DictSource.collect(snapshot.parameters()))
            second.import_optimizer(
                DictSource.collect(snapshot.optimizer()), snapshot.session_state
            )
            first = second
        first.train_step(batch, lr=3e-3).result()
    assert_same_bits(first, straight)


def test_a_snapshot_read_on_another_thread_holds_the_next_update_up(
    make: Make, make_batch: MakeBatch
) -> None:
    """Copying a 7B to take its snapshot would need its memory twice; a checkpoint of two steps
    would be worse."""
    session, batch = make(), make_batch(8, 64)
    session.train_step(batch, lr=3e-3).result()
    expected, snapshot = contents(session), session.snapshot()
    begun, go_on, read = threading.Event(), threading.Event(), {}

    def write() -> None:
        for name, tensor in snapshot.parameters():
            read[name] = tensor.data.copy()
            begun.set()
            go_on.wait(timeout=20)
        read.update((name, t.data.copy()) for name, t in snapshot.optimizer())
        snapshot.close()

    writer = threading.Thread(target=write)
    writer.start()
    begun.wait(timeout=20)
    threading.Timer(0.2, go_on.set).start()
    session.train_step(batch, lr=3e-3).result()
    writer.join(timeout=20)
    assert {n for n, t in expected.items() if not np.array_equal(read[n], t.data)} == set()
    assert contents(session).keys() == expected.keys()
    assert not all(np.array_equal(t.data, expected[n].data) for n, t in contents(session).items())


def test_an_engine_lies_in_the_memory_of_the_gradients(make: Make, make_batch: MakeBatch) -> None:
    """A sample in the middle of a run must not need the model's weights a second time."""
    session = make()
    assert isinstance(session, StreamingSession)
    session.train_step(make_batch(8, 64), lr=3e-3).result()
    decoder = session._resident_decoder()
    memory = session._flat_gradient.untyped_storage()
    inside = range(memory.data_ptr(), memory.data_ptr() + memory.nbytes())
    assert all(p.data_ptr() in inside for block in decoder.layers for p in block.parameters())
    for name, weight in decoder.masters().items():
        assert torch.equal(weight, session._host.masters.weights[name]), name


@pytest.mark.parametrize(
    ("options", "recompute"),
    [({"master": "float32"}, True), ({"slots": 1}, True), ({"offload_residuals": True}, False),
     ({"slot": 2}, True)],
)  # fmt: skip
def test_unusable_options_are_refused(make: Make, options: Any, *, recompute: bool) -> None:
    """Each would train, and not as the user thinks."""
    with pytest.raises(ConfigError):
        make(options=options, recompute=recompute)


def test_backend_chooses_the_session_by_the_option(model: ModelConfig) -> None:
    """`offload = streaming` must not be swallowed, nor anything like it."""
    plan, table = Plan(8, True, "float32", 64, 8), OptimizerTable(name="adamw")

    def session(offload: str) -> TorchSession:
        options = SessionOptions(table, backend_options={"offload": offload})
        made = TorchBackend().train_session(model, options, plan)
        assert isinstance(made, TorchSession)
        return made

    assert isinstance(session("streaming"), StreamingSession)
    assert not isinstance(session("none"), StreamingSession)
    with pytest.raises((ConfigError, BackendError), match="disk"):
        session("disk")
