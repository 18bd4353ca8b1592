"""What the torch backend's tests share: batches of random tokens, and sessions over them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from solollm_torch.session import TorchSession
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solollm.architecture import ModelConfig
from solollm.backend import Batch, Plan, SessionOptions
from solollm.config import OptimizerTable

MakeSession = Callable[..., TorchSession]


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made in this block that were alive at once.

    Every storage is counted once and until it is freed, so the figure is exact and the same on
    every machine, unlike the process's resident memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_tensor(t)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                self.count(storage)
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.known or size == 0:
            return
        self.known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.live -= self.known.pop(key)


@pytest.fixture(scope="session")
def live_bytes() -> type[LiveBytes]:
    """`with live_bytes() as watch: ...`, then `watch.peak` and `watch.live`."""
    return LiveBytes


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
        kind: type[TorchSession] = TorchSession,
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
        return kind(model, options, plan, torch.device("cpu"))

    return make
