"""The planner's coefficients against the peaks of real sessions on a CPU."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
import mlx.core as mx
from solollm_mlx.backend import MlxBackend
from solollm_mlx.memory import PROCESS_BYTES, adapter_bytes, memory_costs
from solollm_mlx.session import MlxSession

from solollm.adapters import AdapterOptions
from solollm.architecture import ModelConfig
from solollm.backend import Batch, DictSource, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.testing.bench import lively_parameters

BASE = {
    "vocab_size": 192, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"activation_checkpointing": True},
    "wide": {"intermediate_size": 384, "num_key_value_heads": 4},
    "many-heads": {"num_attention_heads": 8, "head_dim": 8},
    "long": {"max_position_embeddings": 512},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_planned_activations_are_within_15_percent(
    case: dict[str, Any], make_batch: Callable[..., Batch], make_session: Callable[..., MlxSession]
) -> None:
    """A plan that is too low ends in an out-of-memory kill at night; one too high wastes a Mac."""
    fields = BASE | {key: value for key, value in case.items() if key in ModelConfig.model_fields}
    model = ModelConfig.model_validate(fields)
    checkpointing = case.get("activation_checkpointing", False)
    length = model.max_position_embeddings
    rows = 512 // length
    session = make_session(model, micro_batch_size=rows, activation_checkpointing=checkpointing)
    batch = make_batch(rows, length, packed=True)
    session.probe_step(batch)
    gc.collect()  # or what other tests left, freed on the way, would hide a part of the peak
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    session.probe_step(batch)
    measured = mx.get_peak_memory() - held - 4 * model.num_parameters()  # without the gradients
    costs = memory_costs(model, SessionOptions(OptimizerTable(name="adamw")), "float32")
    per_token = costs.per_token_checkpointed_bytes if checkpointing else costs.per_token_bytes
    planned = per_token * 512 + costs.loss_chunk_bytes
    assert 0.85 < planned / measured < 1.15, f"planned {planned:.0f}, measured {measured}"


@pytest.mark.parametrize(
    ("name", "bits"), [("adamw", 32), ("muon", 32), ("adamw", 8)], ids=["adamw", "muon", "8-bit"]
)
def test_planned_state_is_what_a_session_holds(
    make_session: Callable[..., MlxSession], name: str, bits: int
) -> None:
    """Guards the bytes per parameter, which decide whether a model fits at all."""
    model = ModelConfig.model_validate(BASE | {"num_key_value_heads": 4})
    gc.collect()
    held = mx.get_active_memory()
    session = make_session(model, lively=False, name=name, state_bits=bits)
    taken = mx.get_active_memory() - held
    costs = memory_costs(
        model, SessionOptions(OptimizerTable(name=name, state_bits=bits)), "float32"
    )
    planned = (costs.per_parameter_bytes - 4) * model.num_parameters()  # without the gradients
    assert taken == pytest.approx(planned, rel=0.05)
    session.close()


@pytest.mark.parametrize("bits", [None, 4], ids=["lora", "qlora"])
def test_planned_adapter_state_is_what_a_session_holds(bits: Any) -> None:
    """Guards the bytes of a frozen base, in codes or not: they decide whether a 7B fits a Mac."""
    model = ModelConfig.model_validate(BASE)
    adapter, table = AdapterOptions(rank=8, base_bits=bits), OptimizerTable(name="adamw")
    gc.collect()
    held = mx.get_active_memory()
    options = SessionOptions(table, adapter=adapter, backend_options={"compile": False})
    session = MlxBackend().train_session(model, options, Plan(4, False, "float32", 64, 4))
    session.import_base(DictSource(lively_parameters(model)))
    taken = mx.get_active_memory() - held
    planned = adapter_bytes(model, adapter, table, 4)
    assert taken == pytest.approx(sum(planned.values()) - planned["gradients"], rel=0.05)
    costs = memory_costs(model, options, "float32")
    total = costs.per_parameter_bytes * model.num_parameters()
    assert total == pytest.approx(sum(planned.values()))
    session.close()


def test_process_without_a_model_is_the_fixed_part() -> None:
    """On a CPU the interpreter and the libraries come first (mlx-lm's too: training writes
    samples); measured in a fresh process."""
    pytest.importorskip("mlx_lm.generate", reason="this test needs mlx-lm")
    if "+cu" in getattr(sys.modules.get("torch"), "__version__", ""):
        pytest.skip("mlx-lm has imported a PyTorch for cards, which takes as much again")
    code = (
        "import psutil, mlx_lm.generate, solollm_mlx.session\n"
        "print(psutil.Process().memory_info().rss)"
    )
    command = [sys.executable, "-c", code]
    resident = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.3 * PROCESS_BYTES < resident < 1.15 * PROCESS_BYTES
