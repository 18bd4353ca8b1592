"""`solollm bench train`: how fast this machine trains, beside the other stacks installed on it.

All stacks live in one process, start from the same weights, take the same batches in the same dtype
with the same number of threads, and take turns step by step, so that a noisy machine is noisy for
all of them. Speed is tokens per second of processor time (a shared machine's wall clock measures
the neighbours) and per wall second, and the matrix-multiply rate of the same process says how far
from the ceiling that is. A stack whose losses differ is not the same computation and is marked.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from solollm.architecture import ModelConfig
from solollm.backend import Backend, Batch, Peer, Plan, SessionOptions, TrainSession
from solollm.config import OptimizerTable

OURS = "solollm"
LR = 1e-3
# Stacks differ in which tensors decay, and one has no clipping. Ours does all of its work, at a
# norm that is never met.
TABLE = OptimizerTable(name="adamw", weight_decay=0.0, clip_norm=1e9)
LOSS_TOLERANCE = 1e-4  # relative: how far stacks may differ and still count as the same
DEFAULT_MODEL = ModelConfig(
    vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
    num_attention_heads=6, num_key_value_heads=6, head_dim=64, max_position_embeddings=256,
    tie_word_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True)
class StackResult:
    """One stack. Medians over the counted rounds; `share_of_gemm` is model FLOPs per CPU-second
    over the GEMM rate; `loss_deviation` the largest relative distance from ours."""

    name: str
    tokens_per_cpu_second: float
    tokens_per_second: float
    share_of_gemm: float
    loss_deviation: float
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    peak_bytes: int = 0  # on the device, weights and optimizer included; 0: not counted

    @property
    def is_same(self) -> bool:
        return self.loss_deviation <= LOSS_TOLERANCE


@dataclass(frozen=True)
class TrainBenchmark:
    """`stacks[0]` is ours. `gemm_flops_per_cpu_second` is the median over the rounds."""

    backend: str
    device: str
    versions: Mapping[str, str]
    model: Mapping[str, Any]
    batch_size: int
    seq_len: int
    rounds: int
    threads: int
    gemm_flops_per_cpu_second: float
    stacks: tuple[StackResult, ...]

    def ratio(self, name: str) -> float:
        """Our tokens per CPU-second over a stack's: the median of the rounds' ratios."""
        ours = self.stacks[0]
        theirs = next(stack for stack in self.stacks if stack.name == name)
        pairs = zip(theirs.cpu_seconds, ours.cpu_seconds, strict=True)
        return statistics.median(other / own for other, own in pairs)

    def memory_ratio(self, name: str) -> float:
        """Our peak over a stack's; 0 where it is not counted."""
        other = next(stack for stack in self.stacks if stack.name == name).peak_bytes
        return self.stacks[0].peak_bytes / other if other else 0.0

    def to_json(self) -> dict[str, Any]:
        ratios = {s.name: self.ratio(s.name) for s in self.stacks[1:]}
        memory = {s.name: self.memory_ratio(s.name) for s in self.stacks[1:]}
        return {**asdict(self), "ratios": ratios, "memory_ratios": memory}


class _Ours(Peer):
    def __init__(self, session: TrainSession) -> None:
        self._session = session

    def step(self, batch: Batch, lr: float) -> float:
        return self._session.train_step(batch, lr=lr).result().loss

    def close(self) -> None:
        self._session.close()


def bench_train(
    backend: Backend,
    *,
    model: ModelConfig = DEFAULT_MODEL,
    batch_size: int = 8,
    seq_len: int = 256,
    rounds: int = 5,
    stacks: Sequence[str] | None = None,
    options: Mapping[str, bool | int | float | str] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> TrainBenchmark:
    """Time our AdamW step in fp32 against `stacks` (default: every installed peer of the backend).

    Every stack takes two uncounted steps (it compiles and allocates), then `rounds` in turn.
    """
    plan = Plan(batch_size, False, "float32", seq_len, batch_size)
    model = with_room(model, seq_len)
    session_options = SessionOptions(TABLE, backend_options=options or {})
    makers: dict[str, Callable[[], Peer]] = {
        OURS: lambda: _Ours(backend.train_session(model, session_options, plan))
    }
    for name in backend.peers() if stacks is None else stacks:
        makers[name] = partial(backend.peer, name, model, TABLE, session_options.seed)
    batches = [_batch(model, batch_size, seq_len, index) for index in range(rounds + 1)]
    runners, peaks, losses = warm(backend, makers, lambda peer: _begin(peer, batches[0]), tell)
    wall: dict[str, list[float]] = {name: [] for name in runners}
    cpu: dict[str, list[float]] = {name: [] for name in runners}
    gemm: list[float] = []
    num_tokens = batch_size * seq_len
    for index, batch in enumerate(batches[1:], 1):
        gemm.append(backend.gemm_flops_per_cpu_second(model, num_tokens))
        for name, runner in runners.items():
            tell(f"round {index} of {rounds}: {name}")
            begun, begun_cpu = time.monotonic(), time.process_time()
            losses[name].append(runner.step(batch, LR))
            cpu[name].append(time.process_time() - begun_cpu)
            wall[name].append(time.monotonic() - begun)
    for runner in runners.values():
        runner.close()
    ceiling = statistics.median(gemm)
    flops = model.flops_per_token(seq_len) * num_tokens

    def result(name: str) -> StackResult:
        spent, waited = tuple(cpu[name]), tuple(wall[name])
        own = statistics.median(spent)
        return StackResult(
            name, num_tokens / own, num_tokens / statistics.median(waited),
            flops / own / ceiling if ceiling else math.nan,
            _deviation(losses[name], losses[OURS]), tuple(losses[name]), waited, spent,
            peaks[name],
        )  # fmt: skip

    capabilities = backend.capabilities()
    return TrainBenchmark(
        backend.name, capabilities.device, dict(capabilities.versions), model.model_dump(),
        batch_size, seq_len, rounds, _threads(), ceiling, tuple(result(name) for name in runners),
    )  # fmt: skip


def _begin(stack: Peer, batch: Batch) -> float:
    """The first loss, and a second step: some make their moments after the first one's peak."""
    first = stack.step(batch, LR)
    stack.step(batch, LR)
    return first


def with_room(model: ModelConfig, seq_len: int) -> ModelConfig:
    """The model with a context of at least `seq_len`."""
    longest = max(seq_len, model.max_position_embeddings)
    return model.model_copy(update={"max_position_embeddings": longest})


def warm(
    backend: Backend,
    makers: Mapping[str, Callable[[], Peer]],
    begin: Callable[[Peer], float],
    tell: Callable[[str], None],
) -> tuple[dict[str, Peer], dict[str, int], dict[str, list[float]]]:
    """Every stack made and begun (it compiles and allocates), uncounted: the stacks, the peak of
    device memory that each had by itself, the loss that `begin` gave."""
    runners: dict[str, Peer] = {}
    peaks, losses = {}, {}
    for name, make in makers.items():
        tell(f"warming up {name}")
        held = backend.memory(restart_peak=True).current_bytes
        runners[name] = make()
        losses[name] = [begin(runners[name])]
        peaks[name] = max(0, backend.memory().peak_bytes - held)
    return runners, peaks, losses


def _deviation(losses: Sequence[float], reference: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def _batch(model: ModelConfig, batch_size: int, seq_len: int, index: int) -> Batch:
    """Rows that can be learnt (each counts up from a random id), so that losses move and a stack
    that trains differently is seen."""
    generator = np.random.default_rng(index)
    start = generator.integers(0, model.vocab_size, (batch_size, 1))
    stride = generator.integers(1, 8, (batch_size, 1))
    ids = ((start + stride * np.arange(seq_len + 1)) % model.vocab_size).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:].copy(), float(batch_size * seq_len))


def _threads() -> int:
    import os

    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
