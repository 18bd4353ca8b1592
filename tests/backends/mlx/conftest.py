"""What the MLX backend's tests share: models, batches of random tokens, sessions over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from solollm.architecture import ModelConfig, RopeScaling
from solollm.backend import Batch, DictSource, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.testing.bench import lively_parameters

if TYPE_CHECKING:
    from solollm_mlx.session import MlxSession

SCALING = RopeScaling(original_max_position_embeddings=64)
VARIANTS = {
    "grouped": {},
    "tied-qk_norm": {"tie_word_embeddings": True, "qk_norm": True},
    "llama3-rope": {"rope_theta": 500_000.0, "rope_scaling": SCALING},
    "tied-llama3-rope": {
        "tie_word_embeddings": True, "rope_theta": 500_000.0, "rope_scaling": SCALING,
    },
}  # fmt: skip


@pytest.fixture(params=VARIANTS, scope="session")
def variant(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> ModelConfig:
    """The tiny model in every form that the two decoders could compute differently."""
    return tiny_config.model_copy(
        update={"max_position_embeddings": 512, **VARIANTS[request.param]}
    )


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """make_batch(rows, length, seed=0, packed=False): labels are the next tokens; the last of a
    row, and of each document when packed, has none."""

    def make(rows: int, length: int, *, seed: int = 0, packed: bool = False) -> Batch:
        rng = np.random.default_rng(seed)
        input_ids = rng.integers(0, 192, (rows, length)).astype(np.int32)
        labels = np.full((rows, length), -100, np.int32)
        labels[:, :-1] = input_ids[:, 1:]
        segment_ids = None
        if packed:
            segment_ids = (rng.random((rows, length)) < 4 / length).cumsum(1).astype(np.int32)
            labels[:, :-1][segment_ids[:, 1:] != segment_ids[:, :-1]] = -100
        denominator = float((labels != -100).sum())
        return Batch(input_ids, labels, denominator, segment_ids=segment_ids)

    return make


@pytest.fixture
def make_session(tiny_config: ModelConfig) -> Callable[..., MlxSession]:
    """make_session(model=tiny, micro_batch_size=8, compile=False, ..., optimizer fields by name);
    every matrix matters in its weights, unless `lively` is off."""

    def make(
        model: ModelConfig = tiny_config,
        *,
        micro_batch_size: int = 8,
        activation_checkpointing: bool = False,
        compute_dtype: Any = "float32",
        compile: bool = False,
        lively: bool = True,
        **optimizer: Any,
    ) -> MlxSession:
        from solollm_mlx.backend import MlxBackend

        table = OptimizerTable.model_validate({"name": "adamw", **optimizer})
        plan = Plan(micro_batch_size, activation_checkpointing, compute_dtype, 64, 8)
        options = SessionOptions(table, backend_options={"compile": compile})
        session = MlxBackend().train_session(model, options, plan)
        if lively:
            session.import_parameters(DictSource(lively_parameters(model)))
        return session

    return make
