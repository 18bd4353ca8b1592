"""A snapshot without a session: what storage is tested and rehearsed with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import DType, HostTensor, Snapshot
from solollm.checkpoint import DataPosition, Environment, TrainerState, save_checkpoint

TOKENIZER_FILES: Mapping[str, bytes] = {
    "tokenizer.json": b'{"version": "1.0"}\n',
    "tokenizer_config.json": b"{}\n",
    "chat_template.jinja": b"{{ messages }}",
}
TOKEN_IDS: Mapping[str, int] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


class ArraySnapshot(Snapshot):
    """Initial weights of `seed`, random moments, and one state in 8 bits of an odd size."""

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
        self.moments["momentum_buffer.odd.absmax"] = HostTensor.of(np.ones((1,), np.float32))

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        yield from self.weights.items()

    def optimizer(self) -> Iterator[tuple[str, HostTensor]]:
        yield from self.moments.items()

    def parameter_specs(self) -> Sequence[tuple[str, DType, tuple[int, ...]]]:
        return [(name, tensor.dtype, tensor.shape) for name, tensor in self.weights.items()]

    def optimizer_specs(self) -> Sequence[tuple[str, DType, tuple[int, ...]]]:
        return [(name, tensor.dtype, tensor.shape) for name, tensor in self.moments.items()]


def state_at(step: int) -> TrainerState:
    """A plausible trainer state."""
    environment = Environment(
        backend="toy", device="cpu", micro_batch_size=2, compute_dtype="float32"
    )
    return TrainerState(
        step=step,
        tokens_seen=step * 100,
        session_state={"updates": step, "loss_scale": 0.1},
        data=DataPosition(fingerprint="f" * 16, seed=7, step=step),
        best_loss=1.25,
        best_step=step,
        elapsed_seconds=1.5,
        environment=environment,
    )


def save_arrays(parent: Path, model: ModelConfig, step: int, *, seed: int | None = None) -> Path:
    """Save a checkpoint of `step` with the arrays of `seed` (default: the step)."""
    return save_checkpoint(
        parent,
        model=model,
        snapshot=ArraySnapshot(model, step if seed is None else seed),
        state=state_at(step),
        tokenizer_files=TOKENIZER_FILES,
        token_ids=TOKEN_IDS,
    )
