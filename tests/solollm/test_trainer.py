"""The loop with a session of a few numbers: what it writes down, when it saves, how it ends."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solollm import durable
from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import (
    Batch,
    DType,
    Engine,
    EngineOptions,
    HostTensor,
    MemoryStats,
    PendingMetrics,
    Ranks,
    Snapshot,
    StepMetrics,
    TensorSource,
    TrainSession,
)
from solollm.broken_steps import MAX_CONSECUTIVE_SKIPS, MAX_RETURNS
from solollm.checkpoint import (
    Environment,
    latest_checkpoint,
    list_checkpoints,
    open_checkpoint,
    step_name,
)
from solollm.config import RunConfig, parse_config
from solollm.data.stream import batch_digest, open_stream
from solollm.errors import BackendError, SoloLLMError, Stopped, StoppedBySignal, StorageError
from solollm.ranks import Follower
from solollm.run_log import Row
from solollm.runs import Run
from solollm.testing.hosts import ScriptedHost
from solollm.tokenizer import Tokenizer
from solollm.trainer import Trainer
from solollm.vitals import Vitals
from solollm.watch import Watch
from solollm.workload import Progress, TrainResult, Workload

SEQ_LEN, ROWS = 64, 4


class Done(PendingMetrics):
    def __init__(self, metrics: StepMetrics) -> None:
        self.metrics = metrics

    def result(self) -> StepMetrics:
        return self.metrics


class CopiedSnapshot(Snapshot):
    def __init__(self, session: FakeSession) -> None:
        self.session_state = dict(session.session_state)
        self._weights = {n: HostTensor.of(a.copy()) for n, a in session.weights.items()}

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        yield from self._weights.items()

    def optimizer(self) -> Iterator[tuple[str, HostTensor]]:
        for name, tensor in self._weights.items():
            yield f"exp_avg.{name}", tensor

    def parameter_specs(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        return [(n, t.dtype, t.shape) for n, t in self._weights.items()]

    def optimizer_specs(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        return [(f"exp_avg.{n}", t.dtype, t.shape) for n, t in self._weights.items()]


@dataclass
class FakeSession(TrainSession):
    """Weights that move by the learning rate; `poisoned` steps (counted from 1) are skipped, and
    `half_applied` batches, by their digest, are skipped after half of the weights have moved."""

    model: ModelConfig
    poisoned: frozenset[int] = frozenset()
    half_applied: Callable[[str], bool] = lambda digest: False
    losses: Callable[[int], float] = lambda updates: 3.0  # held-out, after so many updates
    on_step: Callable[[int], None] = lambda step: None
    updates: int = 0
    launched: int = 0
    seen: list[tuple[str, float]] = field(default_factory=list)
    probe_loss: float = 4.0
    released: int = 0

    def __post_init__(self) -> None:
        self.weights = {name: array.copy() for name, array in initial_parameters(self.model, 0)}

    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        self.launched += 1
        self.seen.append((batch_digest(batch), lr))
        self.on_step(self.launched)
        if self.launched in self.poisoned:
            return Done(StepMetrics(math.nan, math.inf, batch.num_targets, True))
        moved = list(self.weights.values())
        if self.half_applied(batch_digest(batch)):
            for array in moved[: len(moved) // 2]:
                array += np.float32(7)
            return Done(StepMetrics(3.0, math.inf, batch.num_targets, True, True))
        for array in moved:
            array -= np.float32(lr)
        self.updates += 1
        return Done(StepMetrics(4.0 / self.launched, 1.0, batch.num_targets, False))

    def probe_step(self, batch: Batch) -> StepMetrics:
        return StepMetrics(self.probe_loss, 1.0, batch.num_targets, False)

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        return self.losses(self.updates) * batch.num_targets, batch.num_targets

    def token_logprobs(self, batch: Batch, *, adapter: bool = True) -> np.ndarray:
        raise NotImplementedError

    def engine(self, options: EngineOptions) -> Engine:
        raise NotImplementedError

    def snapshot(self) -> Snapshot:
        return CopiedSnapshot(self)

    def import_parameters(self, source: TensorSource) -> None:
        self.weights = {name: source.read(name).float32().copy() for name in source.names()}

    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        self.updates = int(state["updates"])

    @property
    def session_state(self) -> Mapping[str, int | float]:
        return {"updates": self.updates}

    def memory(self) -> MemoryStats:
        return MemoryStats(1, 2)

    def release_cache(self) -> None:
        self.released += 1

    def close(self) -> None: ...


class Recorder:
    """A sink that keeps all it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Row]] = []

    def __getattr__(self, name: str) -> Callable[[Row], None]:
        return lambda row: self.told.append((name, dict(row)))

    def rows(self, name: str) -> list[Row]:
        return [row for told, row in self.told if told == name]


@pytest.fixture
def model(small_tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        vocab_size=small_tokenizer.padded_vocab_size, hidden_size=4, intermediate_size=4,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=4,
        max_position_embeddings=SEQ_LEN,
    )  # fmt: skip


@pytest.fixture
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake has no engine; what a sample is, is tested in test_held_out.py."""
    monkeypatch.setattr("solollm.trainer.samples", lambda *arguments, **options: [])


def config_of(model: ModelConfig, steps: int, **tables: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {
        "model": {"config": model.model_dump()},
        "data": {"seq_len": SEQ_LEN},
        "optimizer": {"lr": 0.1},
        "train": {"steps": steps, "batch_size": ROWS},
        "eval": {"every_steps": 0, "batches": 1},
        "log": {"every_steps": 1},
        "checkpoint": {"every_steps": 0, "every_minutes": 0},
    }
    for name, table in tables.items():
        raw[name] = {**raw.get(name, {}), **table}
    return parse_config(raw)


@dataclass
class Bench:
    """Everything a trainer needs, with a fake session."""

    run: Run
    session: FakeSession
    work: Workload
    sink: Recorder
    pauses: list[float] = field(default_factory=list)

    def trainer(self, **options: Any) -> Trainer:
        return Trainer(self.work, self.run, sinks=[self.sink], **options)

    def fit(self, **options: Any) -> TrainResult:
        return self.trainer(**options).fit()

    def saved_steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.run.checkpoints.iterdir())

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.run.read_events() if event["kind"] == kind]


@pytest.fixture
def bench(
    tmp_path: Path, small_corpus: Path, small_tokenizer: Tokenizer, model: ModelConfig,
    no_samples: None,
) -> Callable[..., Bench]:  # fmt: skip
    def make(steps: int = 10, session: FakeSession | None = None, **tables: Any) -> Bench:
        config = config_of(model, steps, **tables)
        path = tmp_path / "run"
        run = Run.open(path) if path.exists() else Run.create(path, config)
        run.config = config
        session = session or FakeSession(model)
        shape: dict[str, Any] = {"seq_len": SEQ_LEN, "batch_size": ROWS, "seed": 0}
        stream = open_stream(small_corpus, split="train", **shape)
        work = Workload(
            session=session,
            stream=stream,
            model=model,
            tokenizer=small_tokenizer,
            environment=Environment(
                backend="fake", device="cpu", micro_batch_size=ROWS, compute_dtype="float32"
            ),
            bytes_per_target=stream.bytes_per_target,
            validation=open_stream(small_corpus, split="validation", **shape),
        )
        return Bench(run, session, work, Recorder())

    return make


def test_every_step_gets_its_own_batch_and_learning_rate(bench) -> None:
    """Guards against a prefetched batch that is one step off, and a schedule that is."""
    made = bench(steps=6, schedule={"name": "linear", "warmup_fraction": 0, "final_fraction": 0})
    made.fit()
    expected = [
        (batch_digest(made.work.stream.batch(step)), pytest.approx(0.1 * (5 - step) / 6))
        for step in range(6)
    ]
    assert made.session.seen == expected


def test_metrics_are_written_every_n_steps_and_at_the_end(bench) -> None:
    """Guards against rows that describe the neighbouring step: the result is read one step late."""
    made = bench(steps=7, log={"every_steps": 3})
    result = made.fit()
    rows = [row for row in made.run.read_metrics() if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert [row["loss"] for row in rows] == pytest.approx([4 / 3, 4 / 6, 4 / 7])
    targets = [made.work.stream.batch(step).num_targets for step in range(7)]
    assert [row["tokens_seen"] for row in rows] == [
        sum(targets[:3]),
        sum(targets[:6]),
        sum(targets),
    ]
    bits = 4 / 3 / math.log(2) / made.work.bytes_per_target
    assert rows[0]["bits_per_byte"] == pytest.approx(bits)
    assert rows[0]["memory_bytes"] == 1
    assert made.sink.rows("metrics") == rows
    assert (result.step, result.tokens_seen) == (7, sum(targets))


def test_throughput_leaves_out_evaluations_and_saves(bench) -> None:
    """Guards against tokens per second that drop whenever a run is evaluated."""
    now = [0.0]
    session = None

    def tick(step: int) -> None:
        now[0] += 2.0

    made = bench(steps=4, log={"every_steps": 2}, eval={"every_steps": 1})
    session = made.session
    session.on_step = tick

    def slow(updates: int) -> float:
        now[0] += 100.0
        return 3.0

    session.losses = slow
    made.fit(clock=lambda: now[0])
    rows = made.sink.rows("metrics")
    targets = [made.work.stream.batch(step).num_targets for step in range(4)]
    assert rows[0]["tokens_per_second"] == pytest.approx(sum(targets[:2]) / 4.0)
    assert rows[1]["tokens_per_second"] == pytest.approx(sum(targets[2:]) / 4.0)


def test_evaluation_covers_the_same_held_out_batches_each_time(bench) -> None:
    """Guards against a held-out loss that changes because other text was read."""
    made = bench(steps=4, eval={"every_steps": 2})
    made.session.losses = lambda updates: 5.0 - updates
    result = made.fit()
    rows = made.sink.rows("evaluation")
    assert [(row["step"], row["loss"]) for row in rows] == [(2, 3.0), (4, 1.0)]
    assert len({row["targets"] for row in rows}) == 1
    assert made.work.validation is not None
    bits = 1.0 / math.log(2) / made.work.validation.bytes_per_target
    assert result.bits_per_byte == pytest.approx(bits)


def test_the_latest_and_the_best_checkpoint_are_kept(bench) -> None:
    """Guards against a best checkpoint that is pruned, and a disk that fills up."""
    made = bench(steps=6, checkpoint={"every_steps": 1, "keep_latest": 2})
    made.session.losses = lambda updates: abs(updates - 2) + 1.0
    result = made.fit()
    assert made.saved_steps() == [2, 5, 6]
    assert result.best_step == 2
    state = open_checkpoint(result.checkpoint).state
    assert (state.best_step, state.best_loss) == (2, 1.0)


def test_saves_of_a_run_that_fell_back_are_kept(bench) -> None:
    """Guards against a run that goes on before damaged checkpoints, and loses each of its own:
    by their numbers the damaged ones are the latest."""
    table = {"every_steps": 1, "keep_latest": 2, "keep_best": False}
    bench(steps=5, checkpoint={**table, "keep_latest": 5}).fit()
    for step in (4, 5):  # what stands under 10 and 11 now is damaged
        folder = bench(steps=12).run.checkpoints
        (folder / step_name(step)).rename(folder / step_name(step + 6))
    made = bench(steps=12, checkpoint=table)
    made.session.on_step = lambda count: (
        os.kill(os.getpid(), signal.SIGTERM) if count == 4 else None
    )
    with pytest.raises(StoppedBySignal):
        made.fit(progress=Progress(step=3))
    assert made.saved_steps() == [6, 7, 10, 11]
    made.session.on_step = lambda count: None
    made.fit(progress=Progress(step=7))
    assert made.saved_steps() == [11, 12]


def test_without_keep_best_only_the_latest_stay(bench) -> None:
    """Guards against `keep_best = false` without effect."""
    made = bench(steps=5, checkpoint={"every_steps": 1, "keep_latest": 3, "keep_best": False})
    made.fit()
    assert made.saved_steps() == [3, 4, 5]


def test_saves_by_time_follow_the_monotonic_clock(bench) -> None:
    """Guards against hours of work that no step count would have saved."""
    now = [1000.0]
    made = bench(steps=9, checkpoint={"every_minutes": 1.0, "keep_latest": 10})
    made.session.on_step = lambda step: now.__setitem__(0, now[0] + 20.0)
    made.fit(clock=lambda: now[0])
    assert made.saved_steps() == [3, 6, 9]


def test_a_checkpoint_holds_the_weights_of_its_own_step(bench) -> None:
    """Guards against a save on another thread that sees weights of later steps."""
    made = bench(steps=5, checkpoint={"every_steps": 2, "keep_latest": 5})
    made.fit()
    name = "model.norm.weight"
    for step in (2, 4, 5):
        checkpoint = open_checkpoint(made.run.checkpoints / f"step-{step:08d}")
        lrs = np.float32([lr for _, lr in made.session.seen[:step]])
        expected = np.ones(4, np.float32)
        for lr in lrs:
            expected = expected - lr
        np.testing.assert_array_equal(checkpoint.parameters().read(name).float32(), expected)
        assert checkpoint.state.session_state == {"updates": step}
        assert checkpoint.state.data.step == step


def test_a_non_finite_step_costs_one_step(bench) -> None:
    """Guards against a NaN that stays in a window, or in a file as text that is not JSON."""
    made = bench(steps=6, session=None)
    made.session.poisoned = frozenset({3})
    result = made.fit()
    assert made.session.updates == 5
    assert result.step == 6
    assert [event["step"] for event in made.events("step_skipped")] == [3]
    lines = (made.run.path / "metrics.jsonl").read_text().splitlines()
    row = next(r for r in map(json.loads, lines) if r["step"] == 3)
    assert row["loss"] is None
    assert "NaN" not in "".join(lines)
    # Nothing was learnt of that batch, as where it is gone around (below).
    learnt = sum(made.work.stream.batch(s).num_targets for s in range(6) if s != 2)
    assert result.tokens_seen == learnt


def test_a_half_applied_step_is_undone_and_gone_around(bench) -> None:
    """Guards against training on from weights of which half are of another step; and against going
    back for ever, since the same batch breaks in the same way."""
    made = bench(steps=12, checkpoint={"every_steps": 4})
    bad = batch_digest(made.work.stream.batch(6))  # makes step 7
    made.session.half_applied = lambda digest: digest == bad
    result = made.fit()
    assert result.step == 12
    assert made.session.updates == 11
    assert [(e["step"], e["to_step"]) for e in made.events("rolled_back")] == [(7, 4)]
    digests = [batch_digest(made.work.stream.batch(step)) for step in range(12)]
    rates, expected = dict(made.session.seen), FakeSession(made.session.model).weights
    for digest in (d for d in digests if d != bad):
        for array in expected.values():
            array -= np.float32(rates[digest])
    for name, array in made.session.weights.items():
        np.testing.assert_array_equal(array, expected[name])
    lines = (made.run.path / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if row["kind"] == "train"]
    assert steps == [step for step in range(1, 13) if step != 7]
    state = open_checkpoint(result.checkpoint).state
    assert state.session_state == {"updates": 11}
    assert state.tokens_seen == sum(
        made.work.stream.batch(s).num_targets for s in range(12) if s != 6
    )


def test_half_applied_before_any_checkpoint_ends_the_run(bench) -> None:
    """Guards against going on from a mixture when there is nothing to go back to."""
    made = bench(steps=12, checkpoint={"every_steps": 10})
    bad = batch_digest(made.work.stream.batch(2))
    made.session.half_applied = lambda digest: digest == bad
    with pytest.raises(SoloLLMError, match="step 3 was not finite, and half") as caught:
        made.fit()
    assert "clip = exact" in caught.value.fix
    assert not list_checkpoints(made.run.checkpoints)


def test_broken_weights_are_not_gone_back_to_for_ever(bench) -> None:
    """Guards against a run that looks busy and goes in circles."""
    made = bench(steps=20, checkpoint={"every_steps": 4})
    good = {batch_digest(made.work.stream.batch(step)) for step in range(5)}
    made.session.half_applied = lambda digest: digest not in good
    with pytest.raises(SoloLLMError, match="went back to step 8 3 times"):
        made.fit()
    assert len(made.events("rolled_back")) == 2 * MAX_RETURNS  # to step 4, then to step 8


def test_ten_skips_in_a_row_end_the_run_and_name_the_last_good_checkpoint(bench) -> None:
    """Guards against days of steps that change nothing."""
    made = bench(steps=40, checkpoint={"every_steps": 5})
    made.session.poisoned = frozenset(range(8, 40))
    with pytest.raises(SoloLLMError, match="10 steps in a row, up to step 17") as caught:
        made.fit()
    assert "step-00000015" in caught.value.fix
    assert caught.value.exit_code == 1
    assert made.sink.rows("finish")[-1]["status"] == "failed"
    assert len(made.events("step_skipped")) == MAX_CONSECUTIVE_SKIPS


def test_skips_that_are_not_in_a_row_do_not_add_up(bench) -> None:
    """Guards against a counter that is never reset."""
    made = bench(steps=40)
    made.session.poisoned = frozenset(range(1, 40, 2))
    assert made.fit().step == 40


def test_the_dry_run_refuses_broken_numbers_before_the_first_step(bench) -> None:
    """Guards against an hour of training from weights that hold NaN."""
    made = bench()
    made.session.probe_loss = math.nan
    with pytest.raises(BackendError, match="dry run of step 1 is not finite"):
        made.fit()
    assert made.session.launched == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_signal_finishes_the_step_saves_and_stops(bench, number, code) -> None:
    """Guards against Ctrl-C that loses the steps since the last save."""
    made = bench(steps=10)
    made.session.on_step = lambda step: os.kill(os.getpid(), number) if step == 4 else None
    with pytest.raises(StoppedBySignal, match="after step 4 of 10") as caught:
        made.fit()
    assert caught.value.exit_code == code
    assert made.saved_steps() == [4]
    assert made.sink.rows("finish")[-1]["status"] == "stopped"
    assert signal.getsignal(number) != signal.SIG_IGN


@pytest.fixture
def watched(bench) -> Callable[..., Bench]:
    """A bench whose machine is looked at after every step, as scripted."""

    def make(*script: Vitals, **settings: Any) -> Bench:
        made: Bench = bench(steps=6, machine={"check_seconds": 1e-9, **settings})
        watch = Watch(ScriptedHost(script), made.run.config.machine, sleep=made.pauses.append)
        made.work = replace(made.work, watch=watch)
        return made

    return make


def test_a_machine_short_of_memory_stops_the_run_after_a_save(watched) -> None:
    """Guards against a run that goes on until the system kills it, and one that loses its steps."""
    made = watched(Vitals(), Vitals("warning"), Vitals("critical"))
    with pytest.raises(Stopped, match="memory pressure after step 3 of 6") as caught:
        made.fit()
    assert caught.value.exit_code == 75
    assert made.saved_steps() == [3]
    assert made.session.released == 2
    assert [e["level"] for e in made.events("memory_pressure")] == ["warning", "critical"]
    assert made.events("stopped")[0]["cause"] == "memory_pressure"
    assert made.sink.rows("finish")[-1]["status"] == "stopped"


def test_a_hot_machine_gets_pauses_and_the_same_training(watched, bench) -> None:
    """Guards against heat that is noticed and not heeded, or that changes what is trained."""
    made = watched(Vitals(heat="critical"))
    result = made.fit()
    assert result.step == 6
    assert len(made.pauses) == 5
    assert min(made.pauses) > 0
    assert made.events("heat")[0]["step"] == 1


class AskedElsewhere(Ranks):
    """The first of two ranks; the other one's values win from some call on."""

    def __init__(self, *values: float, calls: int) -> None:
        self.world_size, self.values, self.calls = 2, values, calls

    def largest(self, *values: float) -> tuple[float, ...]:
        if len(values) != len(self.values):
            return values
        self.calls -= 1
        return tuple(map(max, values, self.values)) if self.calls < 0 else values


def test_a_signal_or_a_machine_of_another_rank_stops_this_one_too(bench) -> None:
    """Guards against a rank that ends alone while the others wait for its gradients."""
    for asked, error in (((-1, signal.SIGTERM), StoppedBySignal), ((0, 0), Stopped)):
        made = bench(steps=6)
        made.work = replace(made.work, ranks=AskedElsewhere(*asked, calls=2))
        with pytest.raises(error, match="after step 3 of 6"):
            made.fit()
        assert made.saved_steps() == [3]
        shutil.rmtree(made.run.path)


def test_a_save_that_is_due_elsewhere_is_due_here(bench) -> None:
    """Guards against clocks of two machines that disagree on when fifteen minutes have passed."""
    made = bench(steps=4)
    made.work = replace(made.work, ranks=AskedElsewhere(1, calls=2))
    made.fit()
    assert made.saved_steps() == [3, 4]


def test_a_rank_that_follows_attends_and_writes_nothing(bench) -> None:
    """Guards against two writers of one run, and a leader that waits for rows of its snapshot."""
    made = bench(steps=3, checkpoint={"every_steps": 2})
    attended: list[int] = []

    class Attending(CopiedSnapshot):
        def attend(self) -> None:
            attended.append(made.session.updates)

    made.session.snapshot = lambda: Attending(made.session)
    before = sorted(made.run.path.rglob("*"))
    result = Trainer(made.work, Follower(made.run.path, made.run.config)).fit()
    assert attended == [0, 2, 3]
    assert result.checkpoint.name == "step-00000003"
    assert sorted(made.run.path.rglob("*")) == before


def test_training_waits_for_a_live_snapshot(bench) -> None:
    """Guards against a step that changes what is being written."""
    made = bench(steps=4, checkpoint={"every_steps": 2})
    events: list[str] = []

    class Live(CopiedSnapshot):
        is_live = True

        def close(self) -> None:
            events.append(f"closed after {made.session.launched}")

    made.session.snapshot = lambda: Live(made.session)
    made.session.on_step = lambda step: events.append(f"step {step}")
    made.fit()
    assert events.index("closed after 2") < events.index("step 3")


def test_the_last_step_is_not_stopped_for(watched) -> None:
    """Guards against a finished run that is reported as stopped."""
    made = watched(*[Vitals()] * 5, Vitals("critical"))
    assert made.fit().step == 6


def test_a_signal_in_the_last_step_finishes_the_run(bench) -> None:
    """Guards against a finished run that is reported as interrupted."""
    made = bench(steps=3)
    made.session.on_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None
    assert made.fit().step == 3


class FullDisk(durable.Disk):
    """Has room for everything but the checkpoint of step 8."""

    def open(self, path: Path, flags: int) -> int:
        if "step-00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().open(path, flags)


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(bench, monkeypatch) -> None:
    """Guards against a failed save that takes the good one with it, or is noticed by nobody."""
    monkeypatch.setattr(durable, "DISK", FullDisk())
    made = bench(steps=20, checkpoint={"every_steps": 4})
    with pytest.raises(StorageError) as caught:
        made.fit()
    assert caught.value.exit_code == 74
    checkpoint, damaged = latest_checkpoint(made.run.checkpoints)
    assert checkpoint is not None
    assert (checkpoint.step, damaged) == (4, [])


def test_a_disk_without_room_is_noticed_before_the_first_step(bench, monkeypatch) -> None:
    """Guards against a night of training that ends at its first save."""
    monkeypatch.setattr(durable.DISK, "free_bytes", lambda path: 1000, raising=False)
    made = bench()
    with pytest.raises(StorageError, match="not enough disk space"):
        made.fit()
    assert made.session.launched == 0


def test_a_sink_that_fails_is_dropped_and_the_run_goes_on(bench) -> None:
    """Guards against a tracker's lost connection that ends days of training."""

    class Broken(Recorder):
        def metrics(self, row: Row) -> None:
            raise ConnectionError("no tracker")

    made = bench(steps=3)
    made.sink = Broken()
    assert made.fit().step == 3
    assert [event["sink"] for event in made.events("sink_failed")] == ["Broken"]


def test_a_resumed_run_writes_the_rows_of_an_undisturbed_one(bench, model) -> None:
    """Guards against doubled or missing steps in metrics.jsonl after a crash."""
    made = bench(steps=10, checkpoint={"every_steps": 4, "keep_latest": 5})

    def crash(step: int) -> None:
        if step == 7:
            raise RuntimeError("power cut")

    made.session.on_step = crash
    with pytest.raises(RuntimeError):
        made.fit()
    assert [row["step"] for row in made.sink.rows("metrics")] == [1, 2, 3, 4, 5]
    checkpoint, _ = latest_checkpoint(made.run.checkpoints)
    assert checkpoint is not None
    again = bench(steps=10, session=FakeSession(model, launched=4))
    again.session.import_parameters(checkpoint.parameters())
    again.session.import_optimizer(checkpoint.optimizer(), checkpoint.state.session_state)
    again.run.rewind_metrics(checkpoint.step)
    state = checkpoint.state
    again.fit(progress=Progress(step=state.step, tokens_seen=state.tokens_seen))
    rows = [row for row in again.run.read_metrics() if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["loss"] for row in rows] == pytest.approx([4 / step for step in range(1, 11)])


def test_samples_are_drawn_at_a_quarter_half_and_the_end(bench, monkeypatch) -> None:
    """Guards against a run that says nothing until it is over."""
    from solollm.held_out import Sample

    monkeypatch.setattr("solollm.trainer.samples", lambda *_, **options: [Sample("a", "b")])
    made = bench(steps=8)
    made.fit()
    rows = made.sink.rows("sample")
    assert [(row["step"], row["prompt"], row["text"]) for row in rows] == [
        (2, "a", "b"), (4, "a", "b"), (8, "a", "b"),
    ]  # fmt: skip
