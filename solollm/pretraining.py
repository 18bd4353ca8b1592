"""From a configuration to a trained run: `pretrain` starts one, `resume` goes on with one.

Here the pieces are made and put together: model, data, backend, plan, session, run directory. The
loop itself is `solollm.trainer`; the values that a config leaves open come from `solollm.horizon`,
weights to start from are vetted in `solollm.starting_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from solollm.backend import Backend, Plan, Ranks, TrainSession
from solollm.checkpoint import Checkpoint, Environment
from solollm.config import RunConfig
from solollm.continuation import compare, look_ahead, require_continuation, tolerance_between
from solollm.data.shards import read_index
from solollm.data.stream import StepStream, require_fingerprint
from solollm.environments import Recorded, environment_of, for_here, lineage_entry
from solollm.errors import ConfigError, IntegrityError, SoloLLMError, StorageError
from solollm.faults import noting_faults
from solollm.finetune.objectives import give_what_needs_weights
from solollm.finetune.rendering import answer_settings
from solollm.finetune.samples import tokenizer_of_samples
from solollm.frozen_base import TrainedAdapter
from solollm.held_out import Scoring
from solollm.horizon import (
    Shape,
    deepest_shape,
    plan_of,
    resolve,
    resolve_model,
    resolve_shape,
    session_options,
    settled,
    trains_adapter,
    updated,
)
from solollm.host import this_host
from solollm.planning import expect
from solollm.ranks import Follower, latest_for_all, locked, on_first, together, watched
from solollm.reality import measure
from solollm.registry import Selected, find_backends, select_backend
from solollm.rehearsal import rehearsal
from solollm.report.html import write_report
from solollm.report.sinks import open_sinks
from solollm.run_log import Row, Sink
from solollm.run_paths import with_base, with_corpora, with_paths_from, with_paths_to
from solollm.run_streams import RunStreams, open_streams, prove_corpora
from solollm.runs import Run
from solollm.starting_weights import (
    StartingWeights,
    bring_base,
    read_starting_weights,
    require_same_base,
)
from solollm.tokenizer import Tokenizer
from solollm.trainer import Trainer
from solollm.vitals import Host
from solollm.watch import Watch
from solollm.workload import Progress, TrainResult, Workload


class OpenedSession(NamedTuple):
    """A session, and what its checkpoints say of its adapter, if that is what it trains."""

    session: TrainSession
    adapter: TrainedAdapter | None


class Start(NamedTuple):
    """Where a run goes on from, and what that was trained in."""

    checkpoint: Checkpoint
    recorded: Recorded


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
    config: RunConfig, run: Path, *, backend: str = "auto", sinks: Sequence[Sink] = (),
    host: Host | None = None,
) -> TrainResult:  # fmt: skip
    """Train a new model into the folder `run`, which must not hold a run yet. `host` is the machine
    to look after; None: this one.

    Raises:
        ConfigError, DataError, IntegrityError, BackendError, PlanError: before anything is
            written.
        Stopped, StorageError, SoloLLMError: as `Trainer.fit`.
    """
    selected = _select(backend, config, None)
    with watched(selected.backend.ranks(), config.machine) as ranks:
        prepared = prepare(config, backend=selected)
        prove_corpora(prepared.config)
        resolved = with_paths_from(prepared.config, run)
        sinks = [*sinks, *open_sinks(config.log.sinks, run)] if ranks.rank == 0 else []
        created = on_first(ranks, lambda: Run.create(run, resolved)) or Follower(run, resolved)
        with locked(created, ranks), noting_faults(created):
            return _train(created, prepared, None, ranks=ranks, sinks=sinks, host=host)


def resume(
    run: Path, *, backend: str = "auto", sinks: Sequence[Sink] = (), corpus: Path | None = None,
    base: Path | None = None, memory: Mapping[str, int | bool] | None = None,
    host: Host | None = None,
) -> TrainResult:  # fmt: skip
    """Go on from the newest intact checkpoint of `run`, or from the start if it has none yet.

    On the machine and backend that wrote the checkpoint the continuation is bitwise: micro-batch,
    dtype, threads and compile setting are kept; elsewhere they are planned anew for the same global
    batch. Either way what comes next is first compared with what the checkpoint's certificate
    promises, where it does (`solollm.continuation`). `corpus` and `base` say where the corpus and
    an adapter's base lie now; they must be the same ones; `memory` sets `micro_batch_size` or
    `activation_checkpointing` anew, for a step that has become too large here. A finished run is
    left alone: `start_step` of the result is then its last step.

    Raises:
        IntegrityError: no checkpoint is intact, another or a damaged corpus, or what comes next is
            not what was promised; nothing was changed.
        RunLocked: another process trains it.
        ConfigError, BackendError, PlanError, and as `Trainer.fit`.
    """
    opened = Run.open(run)
    selected = _select(backend, opened.config, Recorded.newest(opened))
    with watched(selected.backend.ranks(), opened.config.machine) as ranks:
        if ranks.rank > 0:
            opened, sinks = Follower(run, opened.config), []
        with locked(opened, ranks), noting_faults(opened):
            checkpoint, damaged = latest_for_all(opened, ranks)
            config = with_base(with_paths_to(opened.config, run), run, base)
            if checkpoint is not None and checkpoint.step >= (config.train.steps or 0):
                return replace(TrainResult.read(opened, checkpoint), rank=ranks.rank)
            config = with_corpora(config, run, corpus)
            recorded = Recorded.of(opened, checkpoint) if checkpoint else None
            prepared = prepare(config, backend=selected, recorded=recorded, memory=memory)
            prove_corpora(prepared.config)
            sinks = [*sinks, *open_sinks(config.log.sinks, run)] if opened.writes else []
            notes = [{"kind": "checkpoint_damaged", "reason": problem} for problem in damaged]
            start = Start(checkpoint, recorded) if checkpoint and recorded else None
            return _train(opened, prepared, start, ranks=ranks, sinks=sinks, notes=notes, host=host)


def prepare(
    config: RunConfig, *, backend: str | Selected = "auto", recorded: Recorded | None = None,
    memory: Mapping[str, int | bool] | None = None,
) -> Preparation:  # fmt: skip
    """Choose the backend, fill in what the config leaves open, and plan; writes nothing.

    `recorded` is what the run trained in so far: on the same machine and backend it is kept, but
    for what `memory` sets anew.
    """
    if not config.data.corpus:
        raise ConfigError(
            "no corpus is given",
            why="`data.corpus` is empty",
            fix="give --corpus FOLDER; `solollm data build` makes one",
        )
    tokenizer = _tokenizer_of(Path(config.data.corpus), config)
    selected = backend
    if not isinstance(selected, Selected):
        selected = _select(selected, config, recorded)
    chosen = selected.backend
    if recorded is not None:
        config = for_here(config, recorded, chosen)
    if memory:
        config = updated(config, "train", **memory)
    weights = None
    # A resumed run has weights of its own, but for the frozen base of an adapter.
    if config.train.init_from and (recorded is None or trains_adapter(config)):
        weights = read_starting_weights(Path(config.train.init_from), tokenizer)

    rehearse = rehearsal(config, chosen, weights)
    named = config.model.preset or config.model.depth or config.model.config
    is_fixed = config.model.config is not None  # a foreign model's rows may be as many as it likes
    vocab_size = tokenizer.vocab_size if is_fixed else tokenizer.padded_vocab_size
    step_seconds = None
    if weights is not None:
        shape = resolve_shape(config, weights.model_for(config.model))
    elif config.train.hours is not None and not named:
        shape, step_seconds = deepest_shape(config, vocab_size, chosen, rehearse)
    else:
        shape = resolve_shape(config, resolve_model(config.model, vocab_size))
    config = resolve(config, shape, chosen, rehearse, step_seconds=step_seconds)
    plan = plan_of(shape, config, chosen)
    return Preparation(settled(config, chosen, plan), selected, plan, tokenizer, weights)


def _train(
    run: Run,
    prepared: Preparation,
    start: Start | None,
    *,
    ranks: Ranks,
    sinks: Sequence[Sink],
    notes: Sequence[Row] = (),
    host: Host | None = None,
) -> TrainResult:
    """Train from `start`, or from nothing. The caller holds the lock."""
    config, shape = prepared.config, prepared.shape
    streams = open_streams(config, batch_size=shape.batch_size, seq_len=shape.seq_len)
    session, adapter = open_session(prepared, streams, start.checkpoint if start else None)
    with closing(session):
        environment = environment_of(prepared.backend, prepared.plan, session)
        progress = Progress.of(start.checkpoint if start else None)
        completing = give_what_needs_weights(config, streams, session, at_start=start is None)
        resumed: list[Row] = []
        if start is not None:
            codec = adapter.base.codec if adapter else ""
            resumed = _go_on(
                run, start, session, stream=streams.train, environment=environment, codec=codec
            )
        run.rewind_metrics(progress.step)
        expected = expect(config, prepared.plan, prepared.backend)
        run.write_plan({**asdict(prepared.plan), "expected": expected})
        run.record_lineage(progress.step, lineage_entry(environment))
        host = host or this_host()
        work = Workload(
            session=session,
            stream=streams.train,
            model=shape.model,
            tokenizer=prepared.tokenizer,
            environment=environment,
            # The loss of a pair or of an answer is not one per token of a text.
            bytes_per_target=None
            if isinstance(streams.first, Scoring)
            else streams.first.bytes_per_target,
            validation=streams.validation,
            facts=_facts(prepared, streams),
            notes=[*notes, *resumed],
            rehearsed=any(row["kind"] == "continuation_proven" for row in resumed),
            watch=Watch(host, config.machine),
            adapter=adapter,
            generation=answer_settings(prepared.tokenizer) if config.finetune else None,
            is_chat=config.finetune is not None,
            completing=completing,
            ranks=ranks,
        )
        awake = host.keep_awake() if config.machine.keep_awake else nullcontext(True)
        with together(run, ranks), _reported(run), awake as agreed:
            if not agreed:
                run.append_event("keep_awake", held=False)
            return Trainer(work, run, progress=progress, sinks=sinks).fit()


def open_session(
    prepared: Preparation, streams: RunStreams, checkpoint: Checkpoint | None
) -> OpenedSession:
    """A session in the state of `checkpoint`, whose files are closed then; or one at the start.

    Raises:
        IntegrityError: the data, or the frozen base, is not what the checkpoint was trained on.
    """
    if checkpoint is not None:
        require_fingerprint(streams.train, checkpoint.state.data.fingerprint)
    options = session_options(prepared.config, prepared.backend)
    session = prepared.backend.train_session(prepared.shape.model, options, prepared.plan)
    adapter = None
    try:
        if options.adapter is not None:
            assert prepared.starting_weights is not None, "an adapter has a base"
            base = prepared.starting_weights
            adapter = bring_base(session, base, options.adapter, prepared.backend)
            if checkpoint is not None:
                require_same_base(adapter, checkpoint.adapter, prepared.starting_weights.path)
        if checkpoint is not None:
            session.import_parameters(checkpoint.parameters())
            session.import_optimizer(checkpoint.optimizer(), checkpoint.state.session_state)
            checkpoint.close()  # or its disk space would stay taken after it is pruned
        elif prepared.starting_weights is not None and adapter is None:
            session.import_parameters(prepared.starting_weights.parameters())
    except BaseException:
        session.close()
        raise
    return OpenedSession(session, adapter)


def _go_on(
    run: Run, start: Start, session: TrainSession, *, stream: StepStream,
    environment: Environment, codec: str,
) -> list[Row]:  # fmt: skip
    """Prove that the run goes on as it would have, and tell what is not as it was, as events.
    `codec`: of the frozen base now. Raises IntegrityError, with nothing of the run changed."""
    checkpoint, recorded = start
    step, promised = checkpoint.step, checkpoint.certificate.continuation
    rows: list[Row] = [{"kind": "resumed", "step": step, "checkpoint": checkpoint.path.name}]
    changes = recorded.changes(environment)
    if changes:
        rows.append({"kind": "environment_changed", "step": step, "changes": "; ".join(changes)})
    if promised is None:
        return rows
    measured = recorded
    if promised.environment is not None:
        measured = Recorded.parse(promised.environment, checkpoint.path)
    tolerance = tolerance_between(
        measured.environment, environment, same_machine=measured.is_same_machine
    )
    found = look_ahead(session, stream, step)
    held = checkpoint.adapter.base.codec if checkpoint.adapter else codec
    comparison = compare(
        promised, found, step=step, tolerance=tolerance, is_requantised=held != codec
    )
    fields = {"step": step, **comparison._asdict(), "result": str(comparison)}
    if not comparison.holds:
        run.append_event("continuation_refused", **fields)
    require_continuation(comparison, checkpoint.path.name)
    return [*rows, {"kind": "continuation_proven", **fields}]


@contextmanager
def _reported(run: Run) -> Iterator[None]:
    """Lay the plan beside what became of it, and write `report.html`, however the run ends; a page
    that fails hides no other error."""
    try:
        yield
    finally:
        try:
            if run.writes:
                run.write_plan({**run.read_plan(), "measured": measure(run.read_metrics())})
                write_report(run)
        except SoloLLMError as error:
            with suppress(StorageError):  # on a full disk this may be the second thing that fails
                run.append_event("report_failed", reason=str(error))


def _tokenizer_of(corpus: Path, config: RunConfig) -> Tokenizer:
    if config.finetune is not None:
        return tokenizer_of_samples(corpus)
    index = read_index(corpus)
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    if tokenizer.digest != index.tokenizer_digest:
        raise IntegrityError(
            f"{corpus / 'tokenizer'} is not the tokenizer that {corpus} was encoded with",
            why=f"digest {tokenizer.digest[:12]}, not {index.tokenizer_digest[:12]}",
            fix="build the corpus again",
        )
    return tokenizer


def _select(name: str, config: RunConfig, recorded: Recorded | None) -> Selected:
    """The backend asked for, else the config's, else the one the run trained on if it was on this
    machine, else the best here."""
    asked = name if name != "auto" else config.backend
    if asked == "auto" and recorded is not None and recorded.is_same_machine:
        usable = {c.name for c in find_backends() if c.probe.available and c.factory is not None}
        before = recorded.environment.backend
        asked = before if before in usable else "auto"
    return select_backend(asked)


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
