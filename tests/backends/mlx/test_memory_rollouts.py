"""What drawing answers takes, against peaks of real engines over real sessions."""

from __future__ import annotations

import gc
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("mlx_lm", reason="these tests need mlx-lm")
from solollm_mlx.backend import MlxBackend

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
    vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, head_dim=16, max_position_embeddings=512,
    tie_word_embeddings=True,
)  # fmt: skip
SEQUENCES = 8
CASES: dict[str, dict[str, Any]] = {
    "short": {"length": 64},
    "grouped, deep": {"length": 48, "num_key_value_heads": 2, "num_hidden_layers": 8},
    "bf16": {"length": 64, "dtype": "bfloat16"},
    "4 bits": {"length": 64, "bits": 4},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_planned_bytes_are_those_of_an_engine_at_work(case: dict[str, Any]) -> None:
    """A GRPO run that is planned without its caches dies in its first rollouts."""
    fields = {key: value for key, value in case.items() if key in ModelConfig.model_fields}
    model, dtype = MODEL.model_copy(update=fields), case.get("dtype", "float32")
    adapter = AdapterOptions(rank=4, base_bits=4) if case.get("bits") else None
    options = SessionOptions(OptimizerTable(name="adamw"), objective="grpo", adapter=adapter)
    backend = MlxBackend()
    session = backend.train_session(model, options, Plan(4, False, dtype, 64, 4))
    if adapter is not None:
        session.import_base(InitialWeights(model, 0))
    count, length = SEQUENCES, case["length"]
    prompt = tuple(range(length - 4))
    sampling = SamplingParams(temperature=1.0, seed=1)
    gc.collect()  # what it was made of
    before = backend.memory(restart_peak=True).current_bytes
    engine = session.engine(EngineOptions(max_batch_size=count))
    generate(engine, [Request((n, *prompt), 4, sampling) for n in range(count)])
    measured = backend.memory().peak_bytes - before
    engine.close()
    planned = backend.rollout_bytes(model, options, dtype, sequences=count, length=length)
    total = sum(planned.values())
    assert abs(total / measured - 1) < 0.12, f"planned {planned}, measured {measured}"
