"""`solollm bench train`: how fast this machine trains, beside the other stacks installed on it.

All stacks live in one process, start from the same weights, take the same batches in the same dtype
with the same number of threads, and take turns step by step, so that a noisy machine is noisy for
all of them. A stack whose losses differ is not the same computation and is marked.

Speed is held against two ceilings: the matrix-multiply rate of the same process in the same
minutes, and the datasheet's peak where the device has one. A processor is timed by its own seconds
(a shared machine's wall clock measures the neighbours), anything else by the clock on the wall.
What a device cannot say is None: a processor has no datasheet, and its copies run beside nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from solollm.architecture import ModelConfig
from solollm.backend import (
    Backend,
    Batch,
    ComputeDType,
    Copies,
    Peer,
    Plan,
    SessionOptions,
    TrainSession,
    Way,
)
from solollm.config import OptimizerTable
from solollm.devices import table_entry
from solollm.errors import ConfigError, nearest
from solollm.forecast import copied_bytes_per_step
from solollm.hardware import read_machine
from solollm.planner import options_of

OURS = "solollm"
LR = 1e-3
# Stacks differ in which tensors decay, and one has no clipping. Ours does all of its work, at a
# norm that is never met.
TABLE = OptimizerTable(name="adamw", weight_decay=0.0, clip_norm=1e9)
LOSS_TOLERANCE = 1e-4  # relative: how far stacks may differ and still count as the same
RESIDENT = Way("resident")
DEFAULT_MODEL = ModelConfig(
    vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
    num_attention_heads=6, num_key_value_heads=6, head_dim=64, max_position_embeddings=256,
    tie_word_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What every stack does in a step. `recompute` is ours alone: blocks computed again in the
    backward pass."""

    model: ModelConfig
    batch_size: int
    seq_len: int
    compute_dtype: ComputeDType = "float32"
    recompute: bool = False

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def flops(self) -> float:
        return self.model.flops_per_token(self.seq_len) * self.num_tokens


@dataclass(frozen=True)
class Ceilings:
    """What bounds a step here. `gemm_flops` are per processor second on a processor, else per
    second: medians over the rounds. `datasheet_flops` is None where the device has none in this
    dtype."""

    gemm_flops: float
    datasheet_flops: float | None
    datasheet: str | None = None


@dataclass(frozen=True)
class StackResult:
    """One stack. Medians over the counted rounds; the shares are model FLOPs over the ceilings;
    `loss_deviation` the largest relative distance from ours.

    Attributes:
        peak_bytes: on the device, weights and optimizer included; 0: not counted.
        copies: of the last step, as the session counts them; None: it does not.
        planned_copied_bytes: what the planner's formula says of the busier way.
        overlap: max(computing, copying) over the step, 1 where neither waits for the other; None
            where nothing runs beside the computation.
    """

    name: str
    tokens_per_cpu_second: float
    tokens_per_second: float
    share_of_gemm: float | None
    share_of_datasheet: float | None
    loss_deviation: float
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    peak_bytes: int = 0
    copies: Copies | None = None
    planned_copied_bytes: int | None = None
    overlap: float | None = None

    @property
    def is_same(self) -> bool:
        return self.loss_deviation <= LOSS_TOLERANCE


@dataclass(frozen=True)
class TrainBenchmark:
    """`stacks[0]` is ours, in the first way asked for. `peers`: every stack that the backend knows
    to hold beside it, with what it lacks here (empty: it can run)."""

    backend: str
    device: str
    versions: Mapping[str, str]
    work: Work
    rounds: int
    threads: int
    ceilings: Ceilings
    peers: Mapping[str, str]
    stacks: tuple[StackResult, ...]

    def ratio(self, name: str) -> float:
        """Our speed over a stack's: the median of the rounds' ratios, of processor seconds on a
        processor."""
        ours = self.stacks[0]
        theirs = next(stack for stack in self.stacks if stack.name == name)
        pairs = zip(self._spent(theirs), self._spent(ours), strict=True)
        return statistics.median(other / own for other, own in pairs)

    def memory_ratio(self, name: str) -> float:
        """Our peak over a stack's; 0 where it is not counted."""
        other = next(stack for stack in self.stacks if stack.name == name).peak_bytes
        return self.stacks[0].peak_bytes / other if other else 0.0

    @property
    def timed_peers(self) -> list[str]:
        return [stack.name for stack in self.stacks if stack.name in self.peers]

    def to_json(self) -> dict[str, Any]:
        ratios = {s.name: self.ratio(s.name) for s in self.stacks[1:]}
        memory = {s.name: self.memory_ratio(s.name) for s in self.stacks[1:]}
        work = {**asdict(self.work), "model": self.work.model.model_dump()}
        named = {"ratios": ratios, "memory_ratios": memory, "timed_peers": self.timed_peers}
        return {**asdict(self), "work": work, **named}

    def _spent(self, stack: StackResult) -> tuple[float, ...]:
        return stack.cpu_seconds if is_cpu(self.device) else stack.seconds


class Ours(Peer):
    """A session of ours, in the shape in which stacks are timed."""

    def __init__(self, session: TrainSession) -> None:
        self.session = session

    def step(self, batch: Batch, lr: float) -> float:
        loss = self.session.train_step(batch, lr=lr).result().loss
        _ = self.session.session_state  # an update that is still under way belongs to its step
        return loss

    def close(self) -> None:
        self.session.close()


@dataclass
class _Measured:
    """What one stack has shown so far."""

    stack: Peer
    peak_bytes: int
    losses: list[float]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def take(self, batch: Batch) -> None:
        """One step, timed."""
        begun, begun_cpu = time.monotonic(), time.process_time()
        self.losses.append(self.stack.step(batch, LR))
        self.cpu_seconds.append(time.process_time() - begun_cpu)
        self.seconds.append(time.monotonic() - begun)


def bench_train(
    backend: Backend,
    work: Work,
    *,
    rounds: int = 5,
    ways: Sequence[Way] = (RESIDENT,),
    stacks: Sequence[str] | None = None,
    options: Mapping[str, bool | int | float | str] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> TrainBenchmark:
    """Time our AdamW step, in each of the `ways` to hold the model, against `stacks` (default:
    every installed peer of the backend).

    Every stack takes two uncounted steps (it compiles and allocates), then `rounds` in turn.

    Raises:
        BackendError, ConfigError: a way or a stack that this machine cannot.
    """
    work = replace(work, model=with_room(work.model, work.seq_len))
    peers = backend.peers()
    installed = [name for name, lacks in peers.items() if not lacks]
    makers, planned = _our_sessions(backend, work, ways, options or {})
    for name in installed if stacks is None else stacks:
        makers[name] = partial(
            backend.peer, name, work.model, TABLE, seed=0, compute_dtype=work.compute_dtype
        )
    batches = [_batch(work, index) for index in range(rounds + 1)]
    runners, peaks, losses = warm(backend, makers, lambda peer: _begin(peer, batches[0]), tell)
    measured = {n: _Measured(runner, peaks[n], losses[n]) for n, runner in runners.items()}
    is_timed_by_cpu, gemm = is_cpu(backend.capabilities().device), []
    for index, batch in enumerate(batches[1:], 1):
        rate = backend.matmul_rate(work.model, work.num_tokens, work.compute_dtype)
        gemm.append(rate.per_cpu_second if is_timed_by_cpu else rate.per_second)
        for name, one in measured.items():
            tell(f"round {index} of {rounds}: {name}")
            one.take(batch)
    ceilings = _ceilings(backend, work, statistics.median(gemm))
    results = tuple(
        _result(
            name, one, work, ceilings, reference=measured[OURS].losses,
            planned_copied_bytes=planned.get(name), is_timed_by_cpu=is_timed_by_cpu,
        )
        for name, one in measured.items()
    )  # fmt: skip
    for runner in runners.values():
        runner.close()
    known = backend.capabilities()
    return TrainBenchmark(
        backend.name, known.device, dict(known.versions), work, rounds, _threads(), ceilings,
        peers, results,
    )  # fmt: skip


def ways_by_name(backend: Backend, names: Sequence[str]) -> tuple[Way, ...]:
    """Ways to hold a model as `solollm plan` lists them; those of a card can be timed anywhere.

    Raises:
        ConfigError: no such way (says the nearest).
    """
    known = {way.name: way for way in (RESIDENT, *backend.ways("cuda"), *backend.ways())}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"the {backend.name} backend has no way {name!r} to hold a model",
                why=f"it has {', '.join(known)}",
                fix=nearest(name, known),
            )
    return tuple(known[name] for name in names)


def is_cpu(device: str) -> bool:
    """Whether a backend's name for its device means a processor."""
    return device.partition(":")[0] == "cpu"


def _our_sessions(
    backend: Backend, work: Work, ways: Sequence[Way], given: Mapping[str, Any]
) -> tuple[dict[str, Callable[[], Peer]], dict[str, int]]:
    """Our stack in each way, and the bytes that the planner says a step of it copies."""
    makers: dict[str, Callable[[], Peer]] = {}
    planned = {}
    rows = work.batch_size
    plan = Plan(rows, work.recompute, work.compute_dtype, work.seq_len, rows)
    for index, way in enumerate(ways):
        name = OURS if index == 0 else f"{OURS}, {way.name}"
        options = options_of(SessionOptions(TABLE, backend_options=given), way)
        makers[name] = partial(_ours, backend, work.model, options, plan)
        costs = backend.memory_costs(work.model, options, work.compute_dtype)
        planned[name] = copied_bytes_per_step(costs, plan)
    return makers, planned


def _ours(backend: Backend, model: ModelConfig, options: SessionOptions, plan: Plan) -> Peer:
    return Ours(backend.train_session(model, options, plan))


def _ceilings(backend: Backend, work: Work, gemm_flops: float) -> Ceilings:
    entry = table_entry(read_machine(), backend.capabilities().device)
    if entry is None or entry.compute_dtype != work.compute_dtype:
        return Ceilings(gemm_flops, None)
    return Ceilings(gemm_flops, entry.flops, f"{entry.name}: {entry.source}")


def _result(
    name: str,
    one: _Measured,
    work: Work,
    ceilings: Ceilings,
    *,
    reference: Sequence[float],
    planned_copied_bytes: int | None,
    is_timed_by_cpu: bool,
) -> StackResult:
    wall, cpu = statistics.median(one.seconds), statistics.median(one.cpu_seconds)
    rate = work.flops / (cpu if is_timed_by_cpu else wall)
    peak = ceilings.datasheet_flops
    copies = one.stack.session.copies() if isinstance(one.stack, Ours) else None
    return StackResult(
        name, work.num_tokens / cpu, work.num_tokens / wall,
        rate / ceilings.gemm_flops if ceilings.gemm_flops else None,
        rate / peak if peak else None, _deviation(one.losses, reference), tuple(one.losses),
        tuple(one.seconds), tuple(one.cpu_seconds), one.peak_bytes, copies, planned_copied_bytes,
        overlap(copies, one.seconds[-1]),
    )  # fmt: skip


def overlap(copies: Copies | None, step_seconds: float) -> float | None:
    """max(computing, copying) over a step, from the times of its copies; None where they have
    none."""
    if copies is None or copies.stalled_seconds is None:
        return None
    computing = step_seconds - copies.stalled_seconds
    longest = max(computing, copies.load_seconds or 0.0, copies.store_seconds or 0.0)
    return longest / step_seconds


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


def _batch(work: Work, index: int) -> Batch:
    """Rows that can be learnt (each counts up from a random id), so that losses move and a stack
    that trains differently is seen."""
    generator, size = np.random.default_rng(index), (work.batch_size, 1)
    start = generator.integers(0, work.model.vocab_size, size)
    stride = generator.integers(1, 8, size)
    counted = start + stride * np.arange(work.seq_len + 1)
    ids = (counted % work.model.vocab_size).astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:].copy(), float(work.num_tokens))


def _threads() -> int:
    import os

    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
