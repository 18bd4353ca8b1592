"""Checkpoints: whole or absent, proven before use, readable by transformers as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import DType, HostTensor, Snapshot
from solollm.checkpoint import (
    DataPosition,
    Environment,
    TrainerState,
    open_checkpoint,
    save_checkpoint,
)

TOKENIZER_FILES = {
    "tokenizer.json": b'{"version": "1.0"}\n',
    "tokenizer_config.json": b"{}\n",
    "chat_template.jinja": b"{{ messages }}",
}
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


class ArraySnapshot(Snapshot):
    """Initial weights of `seed` and random moments, one of them in 8 bits."""

    def __init__(self, model: ModelConfig, seed: int = 0) -> None:
        self.session_state = {"updates": seed}
        self.weights = {n: HostTensor.of(a) for n, a in initial_parameters(model, seed)}
        noise = np.random.default_rng(seed)
        self.moments = {
            f"{kind}.{name}": HostTensor.of(noise.standard_normal(tensor.shape, np.float32))
            for name, tensor in self.weights.items()
            for kind in ("exp_avg", "exp_avg_sq")
        }
        self.moments["momentum_buffer.odd"] = HostTensor.of(np.arange(7, dtype=np.uint8))
        self.moments["momentum_buffer.odd.absmax"] = HostTensor.of(np.ones((), np.float32))

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        yield from self.weights.items()

    def optimizer(self) -> Iterator[tuple[str, HostTensor]]:
        yield from self.moments.items()

    def parameter_specs(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        return [(n, t.dtype, t.shape) for n, t in self.weights.items()]

    def optimizer_specs(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        return [(n, t.dtype, t.shape) for n, t in self.moments.items()]


def state_at(step: int) -> TrainerState:
    return TrainerState(
        step=step, tokens_seen=step * 100, session_state={"updates": step, "loss_scale": 0.1},
        data=DataPosition(fingerprint="f" * 16, seed=7, step=step), best_loss=1.25, best_step=step,
        elapsed_seconds=1.5,
        environment=Environment(
            backend="toy", device="cpu", micro_batch_size=2, compute_dtype="float32"
        ),
    )  # fmt: skip


def save(parent: Path, model: ModelConfig, step: int, **options: int) -> Path:
    return save_checkpoint(
        parent, model=model, snapshot=ArraySnapshot(model, step), state=state_at(step),
        tokenizer_files=TOKENIZER_FILES, token_ids=TOKEN_IDS, **options,
    )  # fmt: skip


@pytest.mark.parametrize("verify", ["sizes", "digests"])
@pytest.mark.parametrize("shard_bytes", [4_000_000_000, 30_000])
def test_round_trip_is_bit_equal(tiny_config, tmp_path, verify, shard_bytes) -> None:
    """Guards: a tensor, a state field or a shard boundary lost between save and open."""
    path = save(tmp_path, tiny_config, 10, shard_bytes=shard_bytes)
    sharded = (path / "model.safetensors.index.json").exists()
    assert sharded == (shard_bytes == 30_000)
    snapshot, checkpoint = ArraySnapshot(tiny_config, 10), open_checkpoint(path, verify)
    for source, expected in (
        (checkpoint.parameters(), snapshot.weights),
        (checkpoint.optimizer(), snapshot.moments),
    ):
        assert set(source.names()) == set(expected)
        for name, tensor in expected.items():
            read = source.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.data.tobytes() == tensor.data.tobytes()
    assert checkpoint.state == state_at(10)
    assert checkpoint.model == tiny_config
