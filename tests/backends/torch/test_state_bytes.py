"""The planner's table of bytes against a real session on the meta device: equal, line by line."""

from __future__ import annotations

import pytest
import torch
from solollm_torch.memory import resident_bytes
from solollm_torch.session import TorchSession

from solollm.backend import Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.dial import preset


def _bytes(tensors: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("master", "bits"), [("float32", 32), ("split", 8), ("bfloat16", 16)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["1.3b", "2.7b", "7b"])
def test_planned_state_equals_the_session_s_tensors(
    name: str, optimizer: str, master: str, bits: int
) -> None:
    """A plan for a 7B that is a few gigabytes off: the run dies after a night, or never starts."""
    model = preset(name, 32_768)
    table = OptimizerTable.model_validate({"name": optimizer, "state_bits": bits})
    options = SessionOptions(table, backend_options={"master": master})
    plan = Plan(1, True, "bfloat16", model.max_position_embeddings, 1)
    session = TorchSession(model, options, plan, torch.device("meta"))
    counted = {
        "weights": _bytes(session._decoder.parameters()),
        "gradients": _bytes([session._flat_gradient]),
        "optimizer": _bytes(session._states.values()),
    }
    if master == "split":
        counted["residuals"] = _bytes(session._masters.residuals.values())
    assert counted == resident_bytes(model, options, "bfloat16")
