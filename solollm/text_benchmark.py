"""`solollm bench train --text`: documents of their own lengths, as a training run meets them.

A stack that pads its rows to the longest of a batch computes tokens that teach nothing. Here every
stack reads the same documents: a peer in batches of its own making, ours packed into full rows with
attention kept within documents, as many tokens per step on average. Counted are useful tokens, the
targets that the documents hold, per second of processor time; and the peak of memory on the device.
"""

from __future__ import annotations

import json
import statistics
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solollm.architecture import ModelConfig
from solollm.backend import Backend, Batch, Peer, Plan, SessionOptions, TrainSession
from solollm.benchmark import DEFAULT_MODEL, LR, OURS, TABLE, Ours, warm, with_room
from solollm.errors import DataError
from solollm.tokenizer_training import train_tokenizer

ROUND_BATCHES = 4  # a peer's batches that one round's documents make


@dataclass(frozen=True)
class TextStack:
    """One stack. `cpu_seconds` and `useful_tokens` per counted round; `peak_bytes` on the device,
    weights and optimizer included, 0 where it is not counted; `losses` the mean of each round's
    steps."""

    name: str
    useful_tokens_per_cpu_second: float
    peak_bytes: int
    losses: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    useful_tokens: tuple[int, ...]

    @property
    def speeds(self) -> list[float]:
        """Useful tokens per CPU-second of each round."""
        return [n / s for n, s in zip(self.useful_tokens, self.cpu_seconds, strict=True)]


@dataclass(frozen=True)
class TextBenchmark:
    """`stacks[0]` is ours. `rows` and `seq_len` are the shape of our step, `batch_size` documents
    make a peer's."""

    backend: str
    device: str
    versions: Mapping[str, str]
    model: Mapping[str, Any]
    rows: int
    seq_len: int
    batch_size: int
    num_documents: int
    mean_document_tokens: float
    longest_document_tokens: int
    stacks: tuple[TextStack, ...]

    def speed_ratio(self, name: str) -> float:
        """Our useful tokens per CPU-second over a stack's: the median of the rounds' ratios."""
        pairs = zip(self.stacks[0].speeds, self._stack(name).speeds, strict=True)
        return statistics.median(own / other for own, other in pairs)

    def memory_ratio(self, name: str) -> float:
        """Our peak over a stack's; 0 where it is not counted."""
        other = self._stack(name).peak_bytes
        return self.stacks[0].peak_bytes / other if other else 0.0

    def _stack(self, name: str) -> TextStack:
        return next(stack for stack in self.stacks if stack.name == name)

    def to_json(self) -> dict[str, Any]:
        names = [stack.name for stack in self.stacks[1:]]
        ratios = {n: {"speed": self.speed_ratio(n), "memory": self.memory_ratio(n)} for n in names}
        return {**asdict(self), "ratios": ratios}


class _Packed(Ours):
    """Our session, reading documents packed into full rows; what fills none waits for the next
    documents, as in a training run. `targets`: of all steps so far."""

    def __init__(self, session: TrainSession, rows: int, seq_len: int) -> None:
        super().__init__(session)
        self._rows, self._seq_len = rows, seq_len
        self._left: list[np.ndarray] = []
        self.targets = 0

    def step(self, batch: Batch, lr: float) -> float:
        self.targets += batch.num_targets
        return super().step(batch, lr)

    def read(self, documents: Sequence[np.ndarray], batch_size: int, lr: float) -> list[float]:
        batches, self._left = pack([*self._left, *documents], self._rows, self._seq_len)
        return [self.step(batch, lr) for batch in batches]


def bench_text(
    backend: Backend,
    documents: Sequence[np.ndarray],
    *,
    model: ModelConfig = DEFAULT_MODEL,
    batch_size: int = 4,
    rows: int = 2,
    rounds: int = 5,
    stacks: Sequence[str] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> TextBenchmark:
    """Time our AdamW steps in fp32 over documents (int32 ids) against `stacks`.

    Each stack reads one uncounted round alone, in which its peak of memory is taken; then the
    rounds are read in turn. A round is `ROUND_BATCHES` batches of `batch_size` documents.
    """
    size = ROUND_BATCHES * batch_size
    if len(documents) < size * (rounds + 1):
        raise DataError(
            f"{len(documents)} documents are too few for {rounds + 1} rounds of {size}",
            fix="give a longer text, or ask for fewer rounds",
        )
    parts = [documents[size * index : size * (index + 1)] for index in range(rounds + 1)]
    used = [document for part in parts for document in part]
    # As many tokens per step as a peer's batch holds on average.
    seq_len = _to_multiple(_targets(used) / (ROUND_BATCHES * (rounds + 1)) / rows, 32)
    model = with_room(model, seq_len)
    plan = Plan(rows, False, "float32", seq_len, rows)
    makers: dict[str, Callable[[], Peer]] = {
        OURS: lambda: _Packed(
            backend.train_session(model, SessionOptions(TABLE), plan), rows, seq_len
        )
    }
    installed = [name for name, lacks in backend.peers().items() if not lacks]
    for name in installed if stacks is None else stacks:
        makers[name] = partial(backend.peer, name, model, TABLE, seed=0)

    def read(stack: Peer, part: Sequence[np.ndarray]) -> float:
        return statistics.fmean(stack.read(part, batch_size, LR))

    runners, peaks, losses = warm(backend, makers, lambda stack: read(stack, parts[0]), tell)
    measured: dict[str, list[_Round]] = {name: [] for name in runners}
    for index, part in enumerate(parts[1:], 1):
        for name, runner in runners.items():
            tell(f"round {index} of {rounds}: {name}")
            measured[name].append(_timed(runner, part, read))
    for runner in runners.values():
        runner.close()
    capabilities = backend.capabilities()
    return TextBenchmark(
        backend.name, capabilities.device, dict(capabilities.versions), model.model_dump(),
        rows, seq_len, batch_size, len(used), _targets(used) / len(used) + 1, max(map(len, used)),
        tuple(_result(n, peaks[n], losses[n], counted) for n, counted in measured.items()),
    )  # fmt: skip


class _Round(NamedTuple):
    cpu_seconds: float
    useful_tokens: int
    loss: float


def _result(name: str, peak: int, first: list[float], rounds: Sequence[_Round]) -> TextStack:
    seconds, tokens, losses = zip(*rounds, strict=True)
    return TextStack(name, sum(tokens) / sum(seconds), peak, (*first, *losses), seconds, tokens)


def _timed(
    stack: Peer, part: Sequence[np.ndarray], read: Callable[[Peer, Sequence[np.ndarray]], float]
) -> _Round:
    before = stack.targets if isinstance(stack, _Packed) else 0
    begun = time.process_time()
    loss = read(stack, part)
    seconds = time.process_time() - begun
    after = stack.targets if isinstance(stack, _Packed) else _targets(part)
    return _Round(seconds, after - before, loss)


def _targets(documents: Sequence[np.ndarray]) -> int:
    return sum(len(document) - 1 for document in documents)


def pack(
    documents: Sequence[np.ndarray], rows: int, seq_len: int
) -> tuple[list[Batch], list[np.ndarray]]:
    """Documents one after the other in batches of full rows [rows, seq_len], and what is left over
    for the next. A document that a row ends goes on in the next; every token but a document's first
    is a target once."""
    size = rows * seq_len
    free = sum(len(document) - 1 for document in documents) // size * size
    whole, left = [], []
    for document in documents:
        taken = min(free, len(document) - 1)
        free -= taken
        if taken:
            whole.append(document[: taken + 1])
        if taken < len(document) - 1:
            left.append(document[taken:])
    if not whole:
        return [], left
    segments = [np.full(len(part) - 1, index) for index, part in enumerate(whole)]
    pieces = ([part[:-1] for part in whole], [part[1:] for part in whole], segments)
    ids, labels, own = (
        np.concatenate(piece).astype(np.int32).reshape(-1, rows, seq_len) for piece in pieces
    )
    steps = zip(ids, labels, own, strict=True)
    return [Batch(rows_in, wanted, float(size), part) for rows_in, wanted, part in steps], left


def read_documents(path: Path | None, vocab_size: int, longest: int, most: int) -> list[np.ndarray]:
    """Up to `most` documents of a text as int32 ids of a tokenizer trained on it, in an order that
    is shuffled once and always the same.

    `path`: JSON lines, whose strings make a document, or plain text, whose paragraphs do; None: the
    sources of Python's standard library, a file each. Documents are cut at `longest` tokens.
    """
    texts = _texts(path)
    order = np.random.default_rng(0).permutation(len(texts))
    chosen = [texts[index] for index in order[: 4 * most]]
    tokenizer = train_tokenizer(chosen, vocab_size, max_bytes=2_000_000)
    ids = tokenizer.encode_batch(chosen[: 2 * most])
    documents = [array[:longest].astype(np.int32) for array in ids if len(array) > 1]
    return documents[:most]


def _texts(path: Path | None) -> list[str]:
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        return [f.read_text(encoding="utf-8", errors="ignore") for f in sorted(folder.glob("*.py"))]
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [part for part in text.split("\n\n") if part.strip()]
    rows = (json.loads(line) for line in text.splitlines() if line.strip())
    return ["\n".join(v for v in row.values() if isinstance(v, str)) for row in rows]


def _to_multiple(value: float, unit: int) -> int:
    return max(unit, round(value / unit) * unit)
