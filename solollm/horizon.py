"""The dial turned: every setting that a config leaves open gets its value, before a run begins.

A resolved config is what `run.toml` holds, and all that a resume needs: no later step measures or
guesses again. The formulas of the dial are in `solollm.dial`; what fits in memory is the planner's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from solollm.adapters import AdapterOptions
from solollm.architecture import ModelConfig
from solollm.backend import Backend, Batch, Objective, Plan, SessionOptions, TrainSession
from solollm.config import FinetuneTable, ModelTable, OptimizerTable, RunConfig
from solollm.dial import from_depth, horizon, preset
from solollm.errors import BackendError, ConfigError, PlanError
from solollm.planner import plan

DEFAULT_DEPTH = 4
_LARGEST_DEPTH = 32
_PROBE_SECONDS, _PROBE_STEPS = 3.0, 3  # at the least, both
_PATIENCE = 20.0  # seconds after which fewer steps must do
_TRAINING_SHARE = 0.95  # of the hours; the rest is evaluations, samples, saves and start-up

# (session, rows, seq_len) -> for a while, a function that takes a step of that shape at an lr.
Rehearse = Callable[[TrainSession, int, int], AbstractContextManager[Callable[[float], object]]]


@dataclass(frozen=True)
class Shape:
    """What one optimizer step is: the model and the size of its batch."""

    model: ModelConfig
    seq_len: int
    batch_size: int
    lr: float

    @classmethod
    def of(cls, config: RunConfig) -> Shape:
        """The shape of a resolved config; `resolve` makes one."""
        model, seq_len = config.model.config, config.data.seq_len
        rows, lr = config.train.batch_size, config.optimizer.lr
        if model is None or seq_len is None or rows is None or lr is None:
            raise ConfigError(
                "this config leaves model, seq_len, batch_size or lr open",
                why="a run's own run.toml holds all of them",
                fix="start a run with `solollm pretrain`",
            )
        return cls(model, seq_len, rows, lr)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def flops_per_step(self) -> float:
        return self.model.flops_per_token(self.seq_len) * self.tokens_per_step

    @property
    def dial_steps(self) -> int:
        """Steps of the dial's own horizon."""
        return max(1, math.ceil(horizon(self.model).total_tokens / self.tokens_per_step))


def resolve_model(table: ModelTable, vocab_size: int) -> ModelConfig:
    """The model of a table that names one (depth 4 if it does not), with its overrides.

    Raises:
        ConfigError: an unknown preset, or a vocabulary smaller than the corpus's.
    """
    if table.config is not None:
        model = table.config
    elif table.preset is not None:
        model = preset(table.preset, vocab_size)
    else:
        model = from_depth(table.depth or DEFAULT_DEPTH, vocab_size)
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"the model has {model.vocab_size} ids, the corpus's tokenizer needs {vocab_size}",
            fix=f"set model.config.vocab_size to {vocab_size} or more",
        )
    names = ("tie_word_embeddings", "qk_norm", "max_position_embeddings", "rope_theta")
    changes = {n: getattr(table, n) for n in names if getattr(table, n) is not None}
    return ModelConfig.model_validate({**model.model_dump(), **changes})


def resolve_shape(config: RunConfig, model: ModelConfig) -> Shape:
    """The config's seq_len, batch_size and lr, or the dial's for this model.

    Raises:
        ConfigError: seq_len beyond what the model's positions reach.
    """
    dial = horizon(model)
    seq_len = config.data.seq_len or model.max_position_embeddings
    if seq_len > model.max_position_embeddings:
        raise ConfigError(
            f"data.seq_len is {seq_len}, the model's positions end at"
            f" {model.max_position_embeddings}",
            fix=f"--set model.max_position_embeddings={seq_len}, or a smaller data.seq_len",
        )
    rows = config.train.batch_size or max(1, dial.tokens_per_step // seq_len)
    return Shape(model, seq_len, rows, config.optimizer.lr or dial.lr)


def resolve(
    config: RunConfig,
    shape: Shape,
    backend: Backend,
    rehearse: Rehearse,
    *,
    step_seconds: float | None = None,
) -> RunConfig:
    """`config` with the shape and the number of steps filled in. Measures some steps only where the
    horizon is given in hours and `step_seconds` is not known."""
    table = config.train
    if table.steps is not None:
        steps = table.steps
    elif table.tokens is not None:
        steps = math.ceil(table.tokens / shape.tokens_per_step)
    elif table.hours is not None:
        seconds = step_seconds or seconds_per_step(shape, config, backend, rehearse)
        steps = int(table.hours * 3600 * _TRAINING_SHARE / seconds)
    else:
        steps = shape.dial_steps
    filled = config.model_copy(update={"model": ModelTable(config=shape.model)})
    filled = updated(filled, "data", seq_len=shape.seq_len)
    filled = updated(filled, "train", batch_size=shape.batch_size, steps=max(1, steps))
    return updated(filled, "optimizer", lr=shape.lr)


def deepest_shape(
    config: RunConfig, vocab_size: int, backend: Backend, rehearse: Rehearse
) -> tuple[Shape, float | None]:
    """The shape of `--hours` alone: the deepest model whose own horizon fits into that time here;
    and the seconds of its step, if it has been measured.

    The speed is measured at depth 4, and once more at the depth that this speed promises, since a
    larger model uses the machine better.
    """
    assert config.train.hours is not None
    budget = config.train.hours * 3600 * _TRAINING_SHARE

    def at(depth: int) -> Shape:
        table = config.model.model_copy(update={"depth": depth})
        return resolve_shape(config, resolve_model(table, vocab_size))

    depth, measured = DEFAULT_DEPTH, {}
    for _ in range(2):
        measured[depth] = seconds_per_step(at(depth), config, backend, rehearse)
        speed = at(depth).flops_per_step / measured[depth]
        depth = _LARGEST_DEPTH
        while depth > 1 and (
            at(depth).flops_per_step * at(depth).dial_steps > budget * speed
            or not _fits(at(depth), config, backend)
        ):
            depth -= 1
    return at(depth), measured.get(depth)


def seconds_per_step(
    shape: Shape, config: RunConfig, backend: Backend, rehearse: Rehearse
) -> float:
    """Measured wall seconds of one optimizer step, in a session that is thrown away.

    Raises:
        PlanError: the model does not fit.
    """
    options = session_options(config, backend)
    session = backend.train_session(shape.model, options, plan_of(shape, config, backend))
    with closing(session), rehearse(session, shape.batch_size, shape.seq_len) as step:
        step(shape.lr)  # the first one compiles and allocates
        count, passed, begun = 0, 0.0, time.monotonic()
        while passed < (_PROBE_SECONDS if count >= _PROBE_STEPS else _PATIENCE):
            step(shape.lr)
            count, passed = count + 1, time.monotonic() - begun
        seconds = passed / count
        return backend.ranks().largest(seconds)[0]


def plain_steps(batch: Batch) -> Rehearse:
    """Steps on one and the same batch, whatever the weights."""

    @contextmanager
    def begin(session: TrainSession, *_: int) -> Iterator[Callable[[float], object]]:
        yield lambda lr: session.train_step(batch, lr=lr).result()

    return begin


def plan_of(shape: Shape, config: RunConfig, backend: Backend) -> Plan:
    """How this machine runs a step of that shape. Raises PlanError where it cannot."""
    return plan(
        shape.model, session_options(config, backend), config, backend,
        batch_size=shape.batch_size, seq_len=shape.seq_len,
    )  # fmt: skip


def settled(config: RunConfig, backend: Backend, plan: Plan) -> RunConfig:
    """`config` with what the plan chose: where the state lies, and in how many bits."""
    if plan.settings:
        own = {**config.backend_options.get(backend.name, {}), **plan.settings}
        options = {**config.backend_options, backend.name: own}
        config = config.model_copy(update={"backend_options": options})
    if plan.state_bits is not None:
        config = updated(config, "optimizer", state_bits=plan.state_bits)
    return config


def _fits(shape: Shape, config: RunConfig, backend: Backend) -> bool:
    try:
        plan_of(shape, config, backend)
    except PlanError:
        return False
    return True


def session_options(config: RunConfig, backend: Backend) -> SessionOptions:
    """How a session of this config trains on this backend.

    Raises:
        BackendError, ConfigError: paged states, where there are none or not of these.
    """
    if config.optimizer.paged:
        _require_pages(config.optimizer, backend)
    table = config.finetune
    objective: Objective = "lm" if table is None or table.objective == "sft" else table.objective
    beta = {"lm": 0.0, "dpo": table.dpo.beta, "grpo": table.grpo.beta}[objective] if table else 0.0
    return SessionOptions(
        optimizer=config.optimizer,
        seed=config.train.seed,
        objective=objective,
        beta=beta,
        label_smoothing=table.dpo.label_smoothing if table and objective == "dpo" else 0.0,
        adapter=None if table is None else adapter_options(table, seed=config.train.seed),
        backend_options=config.backend_options.get(backend.name, {}),
    )


def _require_pages(table: OptimizerTable, backend: Backend) -> None:
    capabilities = backend.capabilities()
    if not capabilities.paged_states:
        raise BackendError(
            f"optimizer.paged does not work with {backend.name} on {capabilities.device}",
            why="pages move between an NVIDIA card and the host, by PyTorch with bitsandbytes",
            fix="leave it out: optimizer.state_bits = 8 alone takes as little memory",
        )
    if table.name != "adamw" or table.state_bits != 8:
        raise ConfigError(
            f"optimizer.paged does not go with {table.name} in {table.state_bits} bits",
            why="what is paged are the states of 8-bit AdamW",
            fix='set optimizer.name = "adamw" and optimizer.state_bits = 8',
        )


def trains_adapter(config: RunConfig) -> bool:
    """Whether the base stays frozen."""
    return config.finetune is not None and config.finetune.method != "full"


def adapter_options(table: FinetuneTable, *, seed: int) -> AdapterOptions | None:
    """The adapter that a fine-tuning trains; None where it trains everything."""
    if table.method == "full":
        return None
    bits = 4 if table.method == "qlora" else None
    return AdapterOptions(**table.adapter.model_dump(), base_bits=bits, seed=seed)


def updated(config: RunConfig, table: str, /, **values: Any) -> RunConfig:
    """`config` with some values of one table replaced; they must be valid ones."""
    return config.model_copy(update={table: getattr(config, table).model_copy(update=values)})
