"""What drawing answers takes, against tensors counted in real engines over real sessions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from solollm_torch.adapter_session import AdapterSession
from solollm_torch.memory_rollouts import rollout_bytes
from solollm_torch.session import TorchSession

from solollm.adapters import AdapterOptions
from solollm.architecture import ModelConfig
from solollm.backend import (
    EngineOptions,
    InitialWeights,
    Plan,
    Request,
    SamplingParams,
    SessionOptions,
)
from solollm.config import OptimizerTable
from solollm.generation import generate

MODEL = ModelConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
    tie_word_embeddings=True,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "short": {"sequences": 24, "length": 200},
    "grown": {"sequences": 8, "length": 400},
    "grouped": {"sequences": 24, "length": 200, "num_key_value_heads": 2},
    "bf16": {"sequences": 24, "length": 200, "dtype": "bfloat16"},
    "nf4": {"sequences": 8, "length": 64, "bits": 4, "hidden_size": 256, "head_dim": 64},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_planned_bytes_are_those_of_an_engine_at_work(
    case: dict[str, Any], live_bytes: Any
) -> None:
    """A GRPO run that is planned without its caches dies in its first rollouts."""
    if case.get("bits"):
        pytest.importorskip("bitsandbytes", reason="a base in 4 bits needs it")
    fields = {key: value for key, value in case.items() if key in ModelConfig.model_fields}
    model, dtype = MODEL.model_copy(update=fields), case.get("dtype", "float32")
    adapter = AdapterOptions(rank=4, base_bits=4) if case.get("bits") else None
    options = SessionOptions(OptimizerTable(name="adamw"), objective="grpo", adapter=adapter)
    plan, cpu = Plan(4, False, dtype, 64, 4), torch.device("cpu")
    session = (TorchSession if adapter is None else AdapterSession)(model, options, plan, cpu)
    if adapter is not None:
        session.import_base(InitialWeights(model, 0))
    count, length = case["sequences"], case["length"]
    prompt = tuple(range(length - 4))
    sampling = SamplingParams(temperature=1.0, seed=1)
    with live_bytes() as watch:
        engine = session.engine(EngineOptions(max_batch_size=count))
        generate(engine, [Request((n, *prompt), 4, sampling) for n in range(count)])
        engine.close()
    planned = rollout_bytes(
        model, options, dtype, sequences=count, length=length, device=cpu
    )  # fmt: skip
    total = sum(planned.values())
    assert abs(total / watch.peak - 1) < 0.12, f"planned {planned}, measured {watch.peak}"
