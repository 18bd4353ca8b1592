"""8-bit AdamW in pages: made by bitsandbytes' allocator, updated like any other states."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from solollm_torch import paged, state_specs
from solollm_torch.backend import TorchBackend
from solollm_torch.session import TorchSession
from torch import Tensor

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import Batch, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.errors import ConfigError

CPU = torch.device("cpu")
PLAN = Plan(8, False, "float32", 64, 8)


class Pages:
    """bitsandbytes' allocator, as far as it goes without a card: plain memory by the same calls."""

    def __init__(self) -> None:
        self.handed_out: list[Tensor] = []
        self.kept: list[Any] = []

    def cget_managed_ptr(self, size: ctypes.c_size_t) -> int:
        memory = ctypes.create_string_buffer(size.value)
        self.kept.append(memory)
        return ctypes.addressof(memory)

    def on_card(self, host: Tensor, device: torch.device) -> Tensor:
        assert device == CPU
        self.handed_out.append(host)
        return host


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Pages:
    fake = Pages()
    monkeypatch.setattr(bitsandbytes.functional, "lib", fake)
    monkeypatch.setattr(paged, "_as_of_card", fake.on_card)
    return fake


def trained(model: ModelConfig, batch: Batch, table: OptimizerTable) -> TorchSession:
    session = TorchSession(model, SessionOptions(table), PLAN, CPU)
    for _ in range(3):
        session.train_step(batch, lr=1e-3).result()
    return session


def test_every_state_is_paged_and_updated_to_the_same_bits(
    pages: Pages, make_batch: Callable[..., Batch], tiny_config: ModelConfig
) -> None:
    """Guards: a state beside the pages; pages that the update does not write to; other codes."""
    plain = OptimizerTable(name="adamw", state_bits=8)
    model = tiny_config.model_copy(update={"intermediate_size": 200})  # matrices worth 8 bits
    batch = make_batch(2, 20, model.vocab_size)
    expected = trained(model, batch, plain)
    assert not pages.handed_out
    session = trained(model, batch, plain.model_copy(update={"paged": True}))
    addresses = {state.data_ptr() for state in session._states.values()}
    assert addresses == {host.data_ptr() for host in pages.handed_out}
    assert any(state.dtype == torch.uint8 for state in session._states.values())
    for name, state in expected._states.items():
        assert torch.equal(session._states[name], state), name


@pytest.mark.parametrize(("dtype", "kind"), [(torch.uint8, "|u1"), (torch.float32, "<f4")])
def test_pages_are_shown_to_the_card_where_they_are(dtype: torch.dtype, kind: str) -> None:
    """Guards the description by which PyTorch takes the memory over: a copy would not be paged."""
    host = torch.zeros(3, 5, dtype=dtype)
    shown = paged._OnCard(host).__cuda_array_interface__
    place = (host.data_ptr(), False)
    assert shown == {"shape": (3, 5), "typestr": kind, "data": place, "version": 3}


def test_shapes_alone_need_no_pages(tiny_config: ModelConfig) -> None:
    """Guards the planner, which counts bytes on the meta device, where no card is."""
    table = OptimizerTable(name="adamw", state_bits=8, paged=True)
    specs = parameter_table(tiny_config)
    meta = torch.device("meta")
    states = state_specs.zero_states(specs, table, {spec.name: meta for spec in specs})
    assert all(state.device == meta for state in states.values())


@pytest.mark.parametrize("offload", ["streaming", "fsdp"])
def test_states_that_lie_elsewhere_are_not_paged(tiny_config: ModelConfig, offload: str) -> None:
    """Guards a setting that would have no effect."""
    table = OptimizerTable(name="adamw", state_bits=8, paged=True)
    options = SessionOptions(table, backend_options={"offload": offload})
    with pytest.raises(ConfigError, match="offload"):
        TorchBackend().train_session(tiny_config, options, PLAN)
