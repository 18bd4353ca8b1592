"""The bench that conformance checks work on: small models, batches, sessions, comparisons.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from solollm.adapters import AdapterOptions
from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import (
    IGNORED,
    Backend,
    Batch,
    DictSource,
    HostTensor,
    Objective,
    Plan,
    Request,
    SamplingParams,
    SessionOptions,
    StepMetrics,
    TokenEvent,
    TrainSession,
)
from solollm.config import OptimizerTable

# The feed-forward matrices are just large enough for 8-bit states, the others are not.
UNTIED = ModelConfig(
    vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=64,
    qk_norm=True,
)  # fmt: skip
TIED = UNTIED.model_copy(update={"tie_word_embeddings": True, "qk_norm": False})
# Every row a multiple of 64, the length of the groups of the codecs of a frozen base.
QUANTISABLE = TIED.model_copy(update={"hidden_size": 64, "head_dim": 16, "intermediate_size": 128})
REAL_VOCAB_SIZE = 90  # ids from here on are padding rows
ROWS, POSITIONS = 6, 24
LR = 5e-3
Tensors = Mapping[str, HostTensor]


@dataclass(frozen=True)
class State:
    """A copy of all that a session exports."""

    parameters: Tensors
    optimizer: Tensors
    session_state: Mapping[str, int | float]


@dataclass(frozen=True)
class Bench:
    """One backend with one model and one optimizer. With an `adapter` every session is one of it,
    over the base of `lively_parameters`."""

    backend: Backend
    model: ModelConfig
    table: OptimizerTable
    backend_options: Mapping[str, bool | int | float | str]
    adapter: AdapterOptions | None = None
    objective: Objective = "lm"
    beta: float = 0.0
    label_smoothing: float = 0.0

    def __str__(self) -> str:
        head = "tied" if self.model.tie_word_embeddings else "untied"
        method = f"{self.adapter.method}-" if self.adapter else ""
        objective = f"-{self.objective}" if self.objective != "lm" else ""
        return f"{method}{head}-{self.table.name}-{self.table.state_bits}bit{objective}"

    def session(
        self,
        *,
        seed: int = 0,
        micro_batch_size: int = 4,
        table: OptimizerTable | None = None,
        settings: Mapping[str, bool | int | float | str] | None = None,
    ) -> TrainSession:
        """A session with the core's initial weights."""
        options = SessionOptions(
            optimizer=table or self.table,
            seed=seed,
            objective=self.objective,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            adapter=self.adapter and self.adapter.model_copy(update={"seed": seed}),
            backend_options={**self.backend_options, **(settings or {})},
        )
        plan = Plan(
            micro_batch_size=micro_batch_size, activation_checkpointing=False,
            compute_dtype="float32", seq_len=POSITIONS, batch_size=ROWS,
        )  # fmt: skip
        session = self.backend.train_session(self.model, options, plan)
        if self.adapter is not None:
            session.import_base(DictSource(lively_parameters(self.model)))
        return session

    def lively_session(self, *, micro_batch_size: int = 4) -> TrainSession:
        """A session whose every matrix matters: initial output projections are zero, so that a
        fresh model would hide any fault of its attention."""
        session = self.session(micro_batch_size=micro_batch_size)
        session.import_parameters(DictSource(lively_parameters(self.model)))
        return session


def lively_parameters(model: ModelConfig, seed: int = 7) -> dict[str, HostTensor]:
    """Random weights of a size that gives clear preferences among tokens."""
    generator, tensors = np.random.default_rng(seed), {}
    for spec in parameter_table(model):
        values = generator.standard_normal(spec.shape)
        if len(spec.shape) == 1:
            values = 1 + 0.1 * values
        elif spec.group == "matrix":
            values *= spec.shape[1] ** -0.5
        else:
            values *= 0.4
        tensors[spec.name] = HostTensor.of(values.astype(np.float32))
    return tensors


def make_batch(index: int = 0, *, rows: int = ROWS, packed: bool = True) -> Batch:
    """A batch with documents of uneven length and uneven numbers of targets; arrays read-only."""
    generator = np.random.default_rng(1000 + index)
    tokens = generator.integers(0, REAL_VOCAB_SIZE, (rows, POSITIONS + 1)).astype(np.int32)
    labels = tokens[:, 1:].copy()
    for row in range(rows):
        labels[row, generator.random(POSITIONS) < 0.15 * row] = IGNORED
    segments = None
    if packed:
        starts = generator.random((rows, POSITIONS)) < 0.15
        segments = np.cumsum(starts, axis=1, dtype=np.int32)
        last_of_document = segments[:, 1:] != segments[:, :-1]
        labels[:, :-1][last_of_document] = IGNORED
    denominator = float((labels != IGNORED).sum())
    return freeze(Batch(tokens[:, :-1].copy(), labels, denominator, segments))


def freeze(batch: Batch) -> Batch:
    """The same batch with arrays that cannot be written to."""
    for array in (batch.input_ids, batch.labels, batch.segment_ids, batch.token_weights):
        if array is not None:
            array.flags.writeable = False
    return batch


def train(session: TrainSession, indices: Iterable[int]) -> list[StepMetrics]:
    """One step on each of the numbered batches."""
    metrics = []
    for index in indices:
        lr = LR * (1 + index % 3)
        metrics.append(session.train_step(make_batch(index), lr=lr).result())
    return metrics


def state_of(session: TrainSession) -> State:
    """Everything a snapshot yields, copied."""
    snapshot = session.snapshot()
    state = State(
        {name: _copied(tensor) for name, tensor in snapshot.parameters()},
        {name: _copied(tensor) for name, tensor in snapshot.optimizer()},
        dict(snapshot.session_state),
    )
    snapshot.close()
    return state


def _copied(tensor: HostTensor) -> HostTensor:
    return tensor._replace(data=tensor.data.copy())


def next_logprobs(session: TrainSession, ids: Sequence[int]) -> np.ndarray:
    """float32 [V]: log p of every token after `ids`, by `token_logprobs` of V rows."""
    size = len(parameter_rows(session))
    input_ids = np.zeros((size, POSITIONS), np.int32)
    input_ids[:, : len(ids)] = ids
    labels = np.full((size, POSITIONS), IGNORED, np.int32)
    labels[:, len(ids) - 1] = np.arange(size)
    return session.token_logprobs(Batch(input_ids, labels, float(size)))[:, len(ids) - 1]


def parameter_rows(session: TrainSession) -> range:
    """The ids of the vocabulary, as the session's embedding has them."""
    snapshot = session.snapshot()
    shapes = {name: shape for name, _, shape in snapshot.parameter_specs()}
    snapshot.close()
    return range(shapes["model.embed_tokens.weight"][0])


def request(prompt: Sequence[int], *, new: int = 6, seed: int | None = None) -> Request:
    """A greedy request, or with a seed one at temperature 1."""
    sampling = SamplingParams() if seed is None else SamplingParams(temperature=1.0, seed=seed)
    return Request(prompt_ids=tuple(prompt), max_new_tokens=new, sampling=sampling)


def prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    generator = np.random.default_rng(5)
    return [generator.integers(0, REAL_VOCAB_SIZE, 1 + 3 * (i % 4)).tolist() for i in range(count)]


def tokens_of(events: Iterable[TokenEvent], request_id: int) -> list[int]:
    return [e.token for e in events if e.request_id == request_id and e.token >= 0]


def with_denominator(batch: Batch, denominator: float) -> Batch:
    return replace(batch, denominator=denominator)


def require(condition: bool, message: str) -> None:
    """Raises AssertionError; unlike `assert` also under `python -O`."""
    if not condition:
        raise AssertionError(message)


def require_same(actual: Tensors, expected: Tensors, what: str) -> None:
    """Equal names, dtypes, shapes and bits."""
    require(list(actual) == list(expected), f"{what}: names differ")
    for name, tensor in expected.items():
        found = actual[name]
        require(
            (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            and found.data.tobytes() == tensor.data.tobytes(),
            f"{what}: {name} differs",
        )


def require_same_state(actual: State, expected: State, what: str) -> None:
    """Bitwise equality of everything."""
    require_same(actual.parameters, expected.parameters, f"{what}, parameters")
    require_same(actual.optimizer, expected.optimizer, f"{what}, optimizer")
    require(
        actual.session_state == expected.session_state,
        f"{what}, session_state: {actual.session_state} instead of {expected.session_state}",
    )


def require_close(actual: float, expected: float, rtol: float, what: str) -> None:
    near = abs(actual - expected) <= rtol * max(abs(actual), abs(expected), 1e-30)
    require(near, f"{what}: {actual!r} instead of {expected!r}, beyond {rtol} relative")
