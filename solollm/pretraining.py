"""From a configuration to a trained run: `pretrain` starts one, `resume` goes on with one.

Here the pieces are made and put together: model, data, backend, plan, session, run directory. The
loop itself is `solollm.trainer`; the values that a config leaves open come from `solollm.horizon`,
weights to start from are vetted in `solollm.starting_weights`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from solollm.backend import Backend, Batch, Plan, TrainSession
from solollm.checkpoint import Checkpoint, Environment, latest_checkpoint
from solollm.config import RunConfig
from solollm.data.shards import read_index
from solollm.data.stream import require_fingerprint
from solollm.errors import ConfigError, IntegrityError, SoloLLMError
from solollm.hardware import read_machine
from solollm.horizon import (
    Shape,
    deepest_shape,
    plan_of,
    resolve,
    resolve_model,
    resolve_shape,
    session_options,
    updated,
)
from solollm.registry import Selected, find_backends, select_backend
from solollm.report.html import write_report
from solollm.report.sinks import open_sinks
from solollm.run_log import Row
from solollm.run_streams import RunStreams, open_split, open_streams
from solollm.runs import Run
from solollm.starting_weights import StartingWeights, read_starting_weights
from solollm.tokenizer import Tokenizer
from solollm.trainer import Progress, Sink, Trainer, TrainResult, Workload


@dataclass(frozen=True)
class Preparation:
    """A run as it will be, before anything is written. `config` is resolved; its paths hold from
    the current folder."""

    config: RunConfig
    selected: Selected
    plan: Plan
    tokenizer: Tokenizer
    starting_weights: StartingWeights | None = None

    @property
    def backend(self) -> Backend:
        return self.selected.backend

    @property
    def shape(self) -> Shape:
        return Shape.of(self.config)


def pretrain(
    config: RunConfig, run: Path, *, backend: str = "auto", sinks: Sequence[Sink] = ()
) -> TrainResult:
    """Train a new model into the folder `run`, which must not hold a run yet.

    Raises:
        ConfigError, DataError, BackendError, PlanError: before anything is written.
        StoppedBySignal, StorageError, SoloLLMError: as `Trainer.fit`.
    """
    prepared = prepare(config, backend=backend)
    sinks = [*sinks, *open_sinks(config.log.sinks, run)]
    created = Run.create(run, with_paths_from(prepared.config, run))
    with created.lock():
        return _train(created, prepared, None, sinks=sinks)


def resume(
    run: Path, *, backend: str = "auto", sinks: Sequence[Sink] = (), corpus: Path | None = None
) -> TrainResult:
    """Go on from the newest intact checkpoint of `run`, or from the start if it has none yet.

    On the backend and device that wrote the checkpoint the continuation is bitwise: micro-batch,
    dtype, threads and compile setting are kept. `corpus` says where the corpus lies now; it must be
    the same one. A finished run is left alone: `start_step` of the result is then its last step.

    Raises:
        IntegrityError: no checkpoint is intact, or another corpus; nothing was changed.
        RunLocked: another process trains it.
        ConfigError, BackendError, PlanError, and as `Trainer.fit`.
    """
    opened = Run.open(run)
    with opened.lock():
        checkpoint, damaged = latest_checkpoint(opened.checkpoints)
        if checkpoint is None and damaged:
            raise IntegrityError(
                f"no checkpoint of {run} is intact",
                why="; ".join(damaged),
                fix="restore one from a backup, or start a new run",
            )
        config = with_paths_to(opened.config, run)
        if corpus is not None:
            config = updated(config, "data", corpus=str(corpus))
        if checkpoint is not None and checkpoint.step >= (config.train.steps or 0):
            return _finished(opened, checkpoint)
        recorded = checkpoint.state.environment if checkpoint else None
        prepared = prepare(config, backend=backend, recorded=recorded)
        sinks = [*sinks, *open_sinks(config.log.sinks, run)]
        notes = [{"kind": "checkpoint_damaged", "reason": problem} for problem in damaged]
        return _train(opened, prepared, checkpoint, sinks=sinks, notes=notes)


def prepare(
    config: RunConfig, *, backend: str = "auto", recorded: Environment | None = None
) -> Preparation:
    """Choose the backend, fill in what the config leaves open, and plan; writes nothing.

    `recorded` is what the run trained in so far: on the same backend and device it is kept.
    """
    if not config.data.corpus:
        raise ConfigError(
            "no corpus is given",
            why="`data.corpus` is empty",
            fix="give --corpus FOLDER; `solollm data build` makes one",
        )
    tokenizer = _tokenizer_of(Path(config.data.corpus))
    selected = _select(backend, config, recorded)
    chosen = selected.backend
    device = chosen.capabilities().device
    if recorded is not None and (recorded.backend, recorded.device) == (chosen.name, device):
        config = _as_recorded(config, recorded)
    weights = None
    if config.train.init_from:
        weights = read_starting_weights(Path(config.train.init_from), tokenizer)

    def sample_batch(rows: int, seq_len: int) -> Batch:
        corpus = config.data.corpus
        return open_split(config, corpus, "train", batch_size=rows, seq_len=seq_len).batch(0)

    named = config.model.preset or config.model.depth or config.model.config
    vocab_size = tokenizer.padded_vocab_size
    if weights is not None:
        shape = resolve_shape(config, weights.model_for(config.model))
    elif config.train.hours is not None and not named:
        shape = deepest_shape(config, vocab_size, chosen, sample_batch)
    else:
        shape = resolve_shape(config, resolve_model(config.model, vocab_size))
    config = resolve(config, shape, chosen, sample_batch)
    return Preparation(config, selected, plan_of(shape, config, chosen), tokenizer, weights)


def _train(
    run: Run,
    prepared: Preparation,
    checkpoint: Checkpoint | None,
    *,
    sinks: Sequence[Sink],
    notes: Sequence[Row] = (),
) -> TrainResult:
    """Train from `checkpoint`, or from the start. The caller holds the lock."""
    config, shape = prepared.config, prepared.shape
    streams = open_streams(config, batch_size=shape.batch_size, seq_len=shape.seq_len)
    if checkpoint is not None:
        require_fingerprint(streams.train, checkpoint.state.data.fingerprint)
    options = session_options(config, prepared.backend)
    session = prepared.backend.train_session(shape.model, options, prepared.plan)
    with closing(session):
        _load(session, prepared, checkpoint)
        environment = _environment(prepared, session)
        progress = _progress(checkpoint)
        run.rewind_metrics(progress.step)
        run.write_plan(asdict(prepared.plan))
        changes = list(_changes(run, checkpoint, environment))
        run.record_lineage(progress.step, _lineage(environment))
        work = Workload(
            session=session,
            stream=streams.train,
            model=shape.model,
            tokenizer=prepared.tokenizer,
            environment=environment,
            bytes_per_target=streams.first.bytes_per_target,
            validation=streams.validation,
            facts=_facts(prepared, streams),
            notes=[*notes, *changes],
        )
        try:
            return Trainer(work, run, progress=progress, sinks=sinks).fit()
        finally:
            _report(run)


def _report(run: Run) -> None:
    """Write `report.html`, however the run has ended; a page that fails hides no other error."""
    try:
        write_report(run)
    except SoloLLMError as error:
        run.append_event("report_failed", reason=str(error))


def _tokenizer_of(corpus: Path) -> Tokenizer:
    index = read_index(corpus)
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    if tokenizer.digest != index.tokenizer_digest:
        raise IntegrityError(
            f"{corpus / 'tokenizer'} is not the tokenizer that {corpus} was encoded with",
            why=f"digest {tokenizer.digest[:12]}, not {index.tokenizer_digest[:12]}",
            fix="build the corpus again",
        )
    return tokenizer


def _select(name: str, config: RunConfig, recorded: Environment | None) -> Selected:
    """The backend asked for, else the config's, else the one the run trained on, else the best."""
    asked = name if name != "auto" else config.backend
    if asked == "auto" and recorded is not None:
        usable = {c.name for c in find_backends() if c.probe.available and c.factory is not None}
        asked = recorded.backend if recorded.backend in usable else "auto"
    return select_backend(asked)


def _as_recorded(config: RunConfig, recorded: Environment) -> RunConfig:
    """`config` with the settings that decide bits pinned to what the run trained in so far."""
    pinned = updated(
        config,
        "train",
        micro_batch_size=recorded.micro_batch_size,
        compute_dtype=recorded.compute_dtype,
        activation_checkpointing=recorded.activation_checkpointing,
    )
    options = {**config.backend_options.get(recorded.backend, {}), **recorded.settings}
    return pinned.model_copy(
        update={"backend_options": {**config.backend_options, recorded.backend: options}}
    )


def _environment(prepared: Preparation, session: TrainSession) -> Environment:
    capabilities = prepared.backend.capabilities()
    return Environment(
        backend=prepared.backend.name,
        device=capabilities.device,
        versions=dict(capabilities.versions),
        micro_batch_size=prepared.plan.micro_batch_size,
        compute_dtype=prepared.plan.compute_dtype,
        activation_checkpointing=prepared.plan.activation_checkpointing,
        world_size=session.world_size,
        settings=dict(session.settings),
    )


def _lineage(environment: Environment) -> dict[str, Any]:
    return {"cpu": read_machine().cpu, **environment.model_dump(mode="json")}


def _changes(
    run: Run, checkpoint: Checkpoint | None, environment: Environment
) -> Iterator[dict[str, Any]]:
    """Events: the run was resumed, and what is not as it was and may change bits."""
    if checkpoint is None:
        return
    yield {"kind": "resumed", "step": checkpoint.step, "checkpoint": checkpoint.path.name}
    parts = [part for part in run.read_lineage() if part["first_step"] <= checkpoint.step]
    before = dict(parts[-1]["environment"]) if parts else {}
    before |= checkpoint.state.environment.model_dump(mode="json")
    changes = [
        f"{key} was {before[key]}, is {value}"
        for key, value in _lineage(environment).items()
        if key in before and before[key] != value
    ]
    if changes:
        yield {
            "kind": "environment_changed",
            "step": checkpoint.step,
            "changes": "; ".join(changes),
        }


def _load(session: TrainSession, prepared: Preparation, checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        session.import_parameters(checkpoint.parameters())
        session.import_optimizer(checkpoint.optimizer(), checkpoint.state.session_state)
        checkpoint.close()  # or its disk space would stay taken after it is pruned
    elif prepared.starting_weights is not None:
        session.import_parameters(prepared.starting_weights.parameters())


def _progress(checkpoint: Checkpoint | None) -> Progress:
    if checkpoint is None:
        return Progress()
    state = checkpoint.state
    return Progress(
        step=state.step,
        tokens_seen=state.tokens_seen,
        best_loss=state.best_loss,
        best_step=state.best_step,
        elapsed_seconds=state.elapsed_seconds,
    )


def _finished(run: Run, checkpoint: Checkpoint) -> TrainResult:
    """The result of a run that has nothing left to do, read back from its files."""
    rows = run.read_metrics()
    trained = [row for row in rows if row["kind"] == "train"]
    measured = [row for row in rows if row["kind"] == "eval"]
    return TrainResult(
        run=run.path,
        checkpoint=checkpoint.path,
        start_step=checkpoint.step,
        step=checkpoint.step,
        tokens_seen=checkpoint.state.tokens_seen,
        loss=trained[-1]["loss"] if trained else None,
        validation_loss=measured[-1]["loss"] if measured else None,
        bits_per_byte=measured[-1]["bits_per_byte"] if measured else None,
        best_step=checkpoint.state.best_step,
        elapsed_seconds=checkpoint.state.elapsed_seconds,
    )


def _facts(prepared: Preparation, streams: RunStreams) -> dict[str, Any]:
    shape, fit, backend = prepared.shape, prepared.plan, prepared.backend
    return {
        "backend": backend.name,
        "backend_reason": prepared.selected.reason,
        "device": backend.capabilities().device,
        "num_parameters": shape.model.num_parameters(),
        "model": shape.model.model_dump(mode="json"),
        "seq_len": shape.seq_len,
        "batch_size": shape.batch_size,
        "tokens_per_step": shape.tokens_per_step,
        "steps_per_epoch": streams.first.steps_per_epoch,
        "micro_batch_size": fit.micro_batch_size,
        "compute_dtype": fit.compute_dtype,
        "activation_checkpointing": fit.activation_checkpointing,
        "has_validation": streams.validation is not None,
    }


_PATHS = (("data", "corpus"), ("data", "decay_corpus"), ("train", "init_from"))


def with_paths_from(config: RunConfig, run: Path) -> RunConfig:
    """The config with its paths rewritten as seen from the run's folder, which is how `run.toml`
    holds them: a project folder can then be moved as a whole."""
    return _map_paths(config, lambda path: os.path.relpath(Path(path).resolve(), run.resolve()))


def with_paths_to(config: RunConfig, run: Path) -> RunConfig:
    """The other way: a config read from `run.toml`, its paths usable from here."""
    return _map_paths(config, lambda path: str((run.resolve() / path).resolve()))


def _map_paths(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    for table, name in _PATHS:
        path = getattr(getattr(config, table), name)
        if path:
            config = updated(config, table, **{name: change(path)})
    return config
