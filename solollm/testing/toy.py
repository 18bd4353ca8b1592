"""The smallest backend that passes the conformance suite: a bigram-and-a-half model in NumPy.

A reader finds here what every method of the seam must do, without a framework in the way. The model
sees the current token and, within its document, the one before:

    hidden[t] = (E[x[t]] + E[x[t-1]]) * g        logits = hidden @ W.T

with E `model.embed_tokens`, g `model.norm` and W `lm_head` (E again when tied). The block matrices
are held, decayed, saved and loaded like any tensor; nothing is computed with them and their
gradient is zero. The optimizer is in `toy_optimizer`, generation in `toy_engine`.

Shapes: B rows, T positions, C hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import (
    IGNORED,
    Backend,
    Batch,
    Capabilities,
    ComputeDType,
    DType,
    Engine,
    EngineOptions,
    HostTensor,
    MemoryCosts,
    MemoryStats,
    PendingMetrics,
    Plan,
    Probe,
    SessionOptions,
    Snapshot,
    StepMetrics,
    TensorSource,
    TrainSession,
)
from solollm.errors import BackendError, IntegrityError
from solollm.preference import Scored, dpo, grpo, require_fields, rows_at_once
from solollm.tensorfile import open_weights
from solollm.testing.toy_engine import ToyEngine
from solollm.testing.toy_optimizer import ToyOptimizer

Arrays = dict[str, np.ndarray]
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class ToyBackend(Backend):
    """A backend without a framework, for tests; no entry point names it."""

    name = "toy"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(True, "NumPy is always here", "cpu", -1)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            device="cpu", train_dtypes=("float32",), preferred_dtype="float32",
            objectives=("lm", "dpo", "grpo"), optimizers=("adamw",), state_bits=(32, 8),
            versions={"numpy": np.__version__},
        )  # fmt: skip

    def memory_costs(
        self,
        model: ModelConfig,
        options: SessionOptions,
        compute_dtype: ComputeDType,
        *,
        device: str = "",
    ) -> MemoryCosts:
        per_token = 4.0 * (3 * model.hidden_size + 2 * model.vocab_size)
        return MemoryCosts(50_000_000, 16.0, per_token, per_token, 0)

    def train_session(self, model: ModelConfig, options: SessionOptions, plan: Plan) -> ToySession:
        return ToySession(model, options, plan)

    def engine(self, checkpoint: Path, options: EngineOptions) -> Engine:
        text = (checkpoint / "config.json").read_text(encoding="utf-8")
        model = ModelConfig.from_hf(json.loads(text))
        weights = dict(initial_parameters(model, 0))
        source = open_weights(checkpoint)
        try:
            take(weights, source, "parameters")
        finally:
            source.close()
        return ToyEngine(model, weights, options)


class _Forward(NamedTuple):
    """What the backward pass needs again: mixed = E[x[t]] + E[x[t-1]] [B, T, C], previous ids int
    [B, T], whether they count float32 [B, T], log-probabilities [B, T, V]."""

    mixed: np.ndarray
    previous: np.ndarray
    counts: np.ndarray
    logprobs: np.ndarray


class _Done(PendingMetrics):
    def __init__(self, metrics: StepMetrics) -> None:
        self._metrics = metrics

    def result(self) -> StepMetrics:
        return self._metrics


class ToySession(TrainSession):
    """See `solollm.backend.TrainSession`."""

    def __init__(self, model: ModelConfig, options: SessionOptions, plan: Plan) -> None:
        """Raises BackendError for what this backend's `capabilities` do not name."""
        table = options.optimizer
        known = table.name == "adamw" and table.clip == "exact" and table.state_bits in (32, 8)
        if not known:
            raise BackendError(
                f"the toy backend cannot train with {table.name} in"
                f" {table.state_bits} bits and {table.clip} clipping",
                why="it knows only AdamW in 32 and 8 bits, and exact clipping",
                fix='choose optimizer.name = "adamw"',
            )
        self.model, self.plan, self.table, self.options = model, plan, table, options
        self.weights: Arrays = dict(initial_parameters(model, options.seed))
        self.optimizer = ToyOptimizer(model, table)
        self.updates = 0

    @property
    def head(self) -> str:
        return EMBEDDING if self.model.tie_word_embeddings else HEAD

    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        loss, gradients = self.loss_and_gradients(batch)
        norm = global_norm(gradients)
        skipped = not (np.isfinite(loss) and np.isfinite(norm))
        if not skipped:
            limit = self.table.clip_norm
            scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
            clipped = {name: g * np.float32(scale) for name, g in gradients.items()}
            self.optimizer.step(self.weights, clipped, lr=lr, updates=self.updates)
            self.updates += 1
        return _Done(StepMetrics(loss, norm, batch.num_targets, skipped))

    def probe_step(self, batch: Batch) -> StepMetrics:
        loss, gradients = self.loss_and_gradients(batch)
        norm = global_norm(gradients)
        skipped = not (np.isfinite(loss) and np.isfinite(norm))
        return StepMetrics(loss, norm, batch.num_targets, skipped)

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        return float(-self.token_logprobs(batch).sum(dtype=np.float64)), batch.num_targets

    def token_logprobs(self, batch: Batch, *, adapter: bool = True) -> np.ndarray:
        parts = [self._picked(part, self._forward(part)) for part in self.micro_batches(batch)]
        return np.concatenate(parts)

    def engine(self, options: EngineOptions) -> ToyEngine:
        return ToyEngine(self.model, self.weights, options)

    def snapshot(self) -> Snapshot:
        weights = {name: array.copy() for name, array in self.weights.items()}
        states = {name: array.copy() for name, array in self.optimizer.states.items()}
        return ToySnapshot(weights, states, self.session_state)

    def import_parameters(self, source: TensorSource) -> None:
        take(self.weights, source, "parameters")

    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        take(self.optimizer.states, source, "optimizer state")
        self.updates = int(state["updates"])

    @property
    def session_state(self) -> Mapping[str, int | float]:
        return {"updates": self.updates}

    def memory(self) -> MemoryStats:
        arrays = [*self.weights.values(), *self.optimizer.states.values()]
        held = sum(array.nbytes for array in arrays)
        return MemoryStats(held, held)

    def close(self) -> None:
        self.weights.clear()
        self.optimizer.states.clear()

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """Rows of the batch, `micro_batch_size` at a time; the denominator stays the whole's."""
        size = rows_at_once(self.options.objective, self.plan.micro_batch_size)
        arrays: dict[str, Any] = {
            name: a for name, a in vars(batch).items() if isinstance(a, np.ndarray)
        }
        for start in range(0, len(batch.input_ids), size):
            rows = slice(start, start + size)
            yield replace(batch, **{name: array[rows] for name, array in arrays.items()})

    def loss_and_gradients(self, batch: Batch) -> tuple[float, Arrays]:
        """(nats per token, fp32 gradients of the tensors that have one)."""
        require_fields(batch, self.options.objective, self.options.beta)
        loss = 0.0
        names = {EMBEDDING, NORM, self.head}
        gradients = {name: np.zeros_like(self.weights[name]) for name in sorted(names)}
        for part in self.micro_batches(batch):
            forward = self._forward(part)
            part_loss, slopes = self._objective(part, self._picked(part, forward))
            loss += part_loss / part.denominator
            weight = np.float32(1 / part.denominator) * -slopes.astype(np.float32)  # [B, T]
            self._backward(part, forward, weight, gradients)
        return loss, gradients

    def _objective(self, batch: Batch, logprobs: np.ndarray) -> Scored:
        options = self.options
        if options.objective == "lm":
            weights = target_weights(batch)
            return Scored(-float((weights * logprobs).sum(dtype=np.float64)), -weights)
        if options.objective == "dpo":
            return dpo(batch, logprobs, beta=options.beta, label_smoothing=options.label_smoothing)
        return grpo(batch, logprobs, beta=options.beta)

    def _forward(self, batch: Batch) -> _Forward:
        embedding, ids = self.weights[EMBEDDING], batch.input_ids
        previous = np.roll(ids, 1, axis=1)
        counts = np.ones(ids.shape, np.float32)
        counts[:, 0] = 0
        if batch.segment_ids is not None:
            counts[:, 1:] *= batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
        mixed = embedding[ids] + embedding[previous] * counts[..., None]  # [B, T, C]
        logits = (mixed * self.weights[NORM]) @ self.weights[self.head].T  # [B, T, V]
        return _Forward(mixed, previous, counts, log_softmax(logits))

    def _picked(self, batch: Batch, forward: _Forward) -> np.ndarray:
        """float32 [B, T]: log p(label), 0 where there is none."""
        is_target = batch.labels != IGNORED
        labels = np.where(is_target, batch.labels, 0)[..., None]
        picked = np.take_along_axis(forward.logprobs, labels, axis=-1)[..., 0]
        return np.where(is_target, picked, np.float32(0))

    def _backward(
        self, batch: Batch, forward: _Forward, weight: np.ndarray, gradients: Arrays
    ) -> None:
        """Add the gradients of sum(weight * negative log-likelihood)."""
        is_target = batch.labels != IGNORED
        weight = np.where(is_target, weight, np.float32(0))
        logits = np.exp(forward.logprobs) * weight[..., None]  # d loss / d logits, [B, T, V]
        rows, columns = np.nonzero(is_target)
        logits[rows, columns, batch.labels[is_target]] -= weight[is_target]
        hidden = forward.mixed * self.weights[NORM]
        gradients[self.head] += np.einsum("btv,btc->vc", logits, hidden)
        from_head = logits @ self.weights[self.head]  # d loss / d hidden, [B, T, C]
        gradients[NORM] += (from_head * forward.mixed).sum(axis=(0, 1))
        mixed = from_head * self.weights[NORM]
        np.add.at(gradients[EMBEDDING], batch.input_ids, mixed)
        np.add.at(gradients[EMBEDDING], forward.previous, mixed * forward.counts[..., None])


class ToySnapshot(Snapshot):
    """Copies of everything."""

    def __init__(
        self, weights: Arrays, states: Arrays, session_state: Mapping[str, int | float]
    ) -> None:
        self.session_state = session_state
        self._weights, self._states = weights, states

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        return ((name, HostTensor.of(array)) for name, array in self._weights.items())

    def optimizer(self) -> Iterator[tuple[str, HostTensor]]:
        return ((name, HostTensor.of(array)) for name, array in self._states.items())

    def parameter_specs(self) -> Sequence[tuple[str, DType, tuple[int, ...]]]:
        return [(name, tensor.dtype, tensor.shape) for name, tensor in self.parameters()]

    def optimizer_specs(self) -> Sequence[tuple[str, DType, tuple[int, ...]]]:
        return [(name, tensor.dtype, tensor.shape) for name, tensor in self.optimizer()]


def take(arrays: Arrays, source: TensorSource, what: str) -> None:
    """Copy every tensor of `source` into the array of its name; half precision is widened.

    Raises:
        IntegrityError: names what is missing, unexpected, or of another dtype or shape; nothing is
            taken then.
    """
    given = {name: source.read(name) for name in source.names()}
    for name, tensor in given.items():
        if tensor.dtype in ("F16", "BF16"):
            given[name] = HostTensor.of(tensor.float32())
    problems = [f"missing {name}" for name in arrays if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in arrays]
    for name in arrays.keys() & given.keys():
        expected, found = HostTensor.of(arrays[name]), given[name]
        if (found.dtype, tuple(found.shape)) != (expected.dtype, expected.shape):
            problems.append(f"misshapen {name}: {found.dtype} {list(found.shape)}")
    if problems:
        raise IntegrityError(
            f"the {what} does not fit: {'; '.join(sorted(problems)[:8])}",
            why=f"{len(problems)} tensors differ from what this session holds",
            fix="use the configuration that it was saved with",
        )
    for name, tensor in given.items():
        arrays[name][...] = tensor.data


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32, over the last dimension."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def target_weights(batch: Batch) -> np.ndarray:
    """float32 [B, T]: the factor of each target."""
    if batch.token_weights is None:
        return np.ones(batch.labels.shape, np.float32)
    return batch.token_weights


def global_norm(gradients: Mapping[str, np.ndarray]) -> float:
    squares = [float(np.square(g, dtype=np.float64).sum()) for g in gradients.values()]
    return float(np.sqrt(sum(squares)))
