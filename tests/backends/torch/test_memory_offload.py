"""The plan of a streaming session against the real one: buffers on both sides, and its copies."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from solollm_torch import offload
from solollm_torch.lanes import CpuLanes
from solollm_torch.memory_offload import (
    streaming_host_bytes,
    streaming_state_bytes,
    streaming_traffic_bytes,
)
from solollm_torch.offload import StreamingSession
from torch import Tensor

from solollm.architecture import ModelConfig
from solollm.backend import Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.dial import preset
from solollm.testing.bench import TIED, UNTIED, make_batch

META = torch.device("meta")


class _MetaLanes(CpuLanes):
    """Memory that has a size and no content, on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.device = META
        self.host_total = 0

    def host_buffer(self, num_bytes: int) -> Tensor:
        self.host_total += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8, device=META)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _options(master: str, optimizer: str) -> SessionOptions:
    table = OptimizerTable.model_validate({"name": optimizer, "state_bits": 8})
    return SessionOptions(table, backend_options={"master": master, "offload": "streaming"})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("master", ["split", "bfloat16"])
@pytest.mark.parametrize("name", ["1.3b", "2.7b", "7b"])
def test_planned_bytes_equal_the_session_s_buffers(
    name: str, master: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 7B that is planned into 64 GB and pins 70."""
    lanes = _MetaLanes()
    monkeypatch.setattr(offload, "lanes_for", lambda _: lanes)
    monkeypatch.setattr(StreamingSession, "_initial_weights", lambda *_: ())
    model, options = preset(name, 32_768), _options(master, optimizer)
    session = StreamingSession(model, options, Plan(1, True, "bfloat16", 2048, 1), META)
    assert {
        "weight slots": _bytes(session._ring.buffers),
        "update slots": _bytes(session._streamed._slots),
        "embedding, norm, head": _bytes(session._decoder.masters().values()),
        "gradients": session._flat_gradient.nbytes,
    } == streaming_state_bytes(model, options, "bfloat16", META)
    (planned,) = streaming_host_bytes(model, options).values()
    assert 0 <= lanes.host_total - planned < 64 * 16 * model.num_hidden_layers  # cache lines


@pytest.mark.parametrize("model", [TIED, UNTIED], ids=["tied", "untied"])
def test_planned_traffic_is_what_a_step_loads(model: ModelConfig) -> None:
    """Copies forecast for one micro-batch whatever their number."""
    deep = model.model_copy(update={"num_hidden_layers": 5})
    options = SessionOptions(
        OptimizerTable(name="adamw", state_bits=8, clip="lagged"),
        backend_options={"offload": "streaming", "threads": 1},
    )
    planned = streaming_traffic_bytes(deep, options)
    for rows, count in ((2, 1), (6, 3)):
        plan = Plan(2, True, "float32", 24, rows)
        session = StreamingSession(deep, options, plan, torch.device("cpu"))
        batch = make_batch(rows=rows)
        for _ in range(2):
            session.train_step(batch, lr=1e-3).result()
        assert session.traffic.loaded == planned["update"] + count * planned["micro-batch"]
        session.close()
