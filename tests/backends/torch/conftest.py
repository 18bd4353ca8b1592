"""What the torch backend's tests share: batches of random tokens, and sessions over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch.session import TorchSession

from solollm.architecture import ModelConfig
from solollm.backend import Batch, Plan, SessionOptions
from solollm.config import OptimizerTable

MakeSession = Callable[..., TorchSession]


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """make_batch(rows, length, vocab_size=192, seed=0, packed=False): labels are the next tokens;
    the last of a row, and of each document when packed, has none."""

    def make(
        rows: int, length: int, vocab_size: int = 192, *, seed: int = 0, packed: bool = False
    ) -> Batch:
        rng = np.random.default_rng(seed)
        input_ids = rng.integers(0, vocab_size, (rows, length)).astype(np.int32)
        labels = np.full((rows, length), -100, np.int32)
        labels[:, :-1] = input_ids[:, 1:]
        segment_ids = None
        if packed:
            borders = rng.random((rows, length)) < 4 / length
            segment_ids = borders.cumsum(1).astype(np.int32)
            labels[:, :-1][segment_ids[:, 1:] != segment_ids[:, :-1]] = -100
        denominator = float((labels != -100).sum())
        return Batch(input_ids, labels, denominator, segment_ids=segment_ids)

    return make


@pytest.fixture
def make_session(tiny_config: ModelConfig) -> MakeSession:
    """make_session(model=tiny, micro_batch_size=8, ..., optimizer fields by name)."""

    def make(
        model: ModelConfig = tiny_config,
        *,
        micro_batch_size: int = 8,
        activation_checkpointing: bool = False,
        compute_dtype: Any = "float32",
        backend_options: dict[str, bool | int | float | str] | None = None,
        seed: int = 0,
        **optimizer: Any,
    ) -> TorchSession:
        table = OptimizerTable.model_validate({"name": "adamw", **optimizer})
        plan = Plan(micro_batch_size, activation_checkpointing, compute_dtype, 64, 8)
        options = SessionOptions(table, seed=seed, backend_options=backend_options or {})
        return TorchSession(model, options, plan, torch.device("cpu"))

    return make
