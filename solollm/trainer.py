"""The loop: take a batch, take a step, write down, evaluate, save, until the last step or a signal.

Read `Trainer.fit` first; everything else here is one of its lines. A session computes, a stream
gives the batch of a step, `schedule.lr_at` its learning rate, `run_log` writes down, and
`checkpoint_writer` saves on its own thread. What makes these of a config: `solollm.pretraining`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solollm.backend import PendingMetrics, StepMetrics
from solollm.broken_steps import BrokenSteps, HalfAppliedError
from solollm.checkpoint import DataPosition, TrainerState
from solollm.checkpoint_writer import CheckpointAttendant, CheckpointWriter
from solollm.continuation import dry_run, promise
from solollm.data.stream import Prefetch
from solollm.errors import Stopped, StoppedBySignal, quoted
from solollm.held_out import HeldOut, bits_per_byte, held_out_loss, samples
from solollm.run_log import RunLog, Sink, finite
from solollm.runs import Run
from solollm.schedule import lr_at
from solollm.signals import StopRequest
from solollm.watch import STOP_FIXES, StopCause
from solollm.workload import Interval, Progress, TrainResult, Workload

__all__ = ["Trainer"]


@dataclass(frozen=True)
class _Launched:
    """A step whose result nobody has asked for yet."""

    step: int
    lr: float
    pending: PendingMetrics
    facts: Mapping[str, float]


class Trainer:
    """Trains one run on `run.config`, which must be resolved (`solollm.horizon`). The caller holds
    the run's lock and closes the session."""

    def __init__(
        self,
        work: Workload,
        run: Run,
        *,
        progress: Progress | None = None,
        sinks: Sequence[Sink] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert run.config.train.steps is not None, "the config is not resolved"
        assert run.config.optimizer.lr is not None, "the config is not resolved"
        self._work, self._session = work, work.session
        self._run, self._config = run, run.config
        self._total_steps = run.config.train.steps
        self._peak_lr = run.config.optimizer.lr
        self._progress = progress or Progress()
        self._start_step = self._progress.step
        self._log = RunLog(run, sinks)
        self._clock = clock
        self._writer = (CheckpointWriter if run.writes else CheckpointAttendant)(
            run.checkpoints,
            work.contents(),
            keep_latest=run.config.checkpoint.keep_latest,
            after=self._start_step,
        )
        self._launched: _Launched | None = None
        self._broken = BrokenSteps(run, self._log)
        self._loss: float | None = None
        self._held_out: HeldOut | None = None
        self._evaluated_step: int | None = None
        self._checkpoint: Path | None = None
        self._saved_step = self._start_step
        self._began = self._last_save = clock()
        self._interval = Interval(self._began)
        self._elapsed_before = self._progress.elapsed_seconds

    def fit(self) -> TrainResult:
        """Train to the last step.

        Raises:
            StoppedBySignal: SIGINT or SIGTERM came; the run is saved.
            Stopped: the machine cannot go on (memory pressure, battery); the run is saved.
            StorageError: a save failed; the checkpoints before it are untouched.
            SoloLLMError: ten steps in a row were not finite.
        """
        status = "failed"
        try:
            with StopRequest() as stop, Prefetch(self._work.stream) as batches, self._writer:
                self._start(batches)
                while self._progress.step < self._total_steps:
                    try:
                        self._advance(batches, stop)
                    except HalfAppliedError as half_applied:
                        self._go_back(half_applied.step)
                self._note_finished_save(wait=True)
                status = "finished"
        except Stopped:
            status = "stopped"
            raise
        finally:
            self._log.finish({"status": status, **self._summary()})
        return self._result()

    def _advance(self, batches: Prefetch, stop: StopRequest) -> None:
        """One step, and whatever is due after it."""
        self._launch(batches)
        if self._evaluation_due():
            self._evaluate()
        if self._samples_due():
            self._write_samples()
        if self._work.ranks.largest(self._save_due())[0]:
            self._save(rank=True)
        self._note_finished_save()
        if self._progress.step < self._total_steps:
            self._stop_if_asked(stop)

    def _go_back(self, step: int) -> None:
        """To the last checkpoint, and from there around the batch of step `step`."""
        self._launched = None
        with self._aside():
            self._note_finished_save(wait=True)
            self._work.ranks.largest(0)  # rank 0 has saved
            checkpoint = self._broken.go_back(step, self._session)
        state, progress = checkpoint.state, self._progress
        progress.step, progress.tokens_seen = state.step, state.tokens_seen
        progress.best_loss, progress.best_step = state.best_loss, state.best_step
        self._saved_step, self._evaluated_step = state.step, None
        self._run.rewind_metrics(state.step)

    def _start(self, batches: Prefetch) -> None:
        """Tell the sinks; then one step that changes nothing, so that running out of memory, a
        full disk or broken numbers show in seconds and not after an hour."""
        first = self._start_step
        place = {"start_step": first, "total_steps": self._total_steps}
        self._log.start({"run": self._run.path.name, **place, **self._work.facts})
        for note in self._work.notes:
            self._log.event(**note)
        with closing(self._session.snapshot()) as snapshot:
            self._writer.require_room(snapshot)
        if not self._work.rehearsed:
            dry_run(self._session, self._work.ready(first, batches.batch(first)), first)
        self._interval = Interval(self._clock())

    def _launch(self, batches: Prefetch) -> None:
        """Start the next step, then read the one before while this one runs."""
        step = self._progress.step
        begun = self._clock()
        batch = self._work.ready(step, batches.batch(step))
        self._interval.data_wait_seconds += self._clock() - begun
        if self._broken.is_passed_over(step + 1):
            self._resolve()
            self._progress.step = step + 1
            return
        table, total = self._config.schedule, self._total_steps
        lr = lr_at(step, total_steps=total, peak_lr=self._peak_lr, table=table)
        pending = self._session.train_step(batch, lr=lr)
        self._interval.tokens += batch.num_targets
        self._resolve()
        self._progress.step = step + 1
        self._launched = _Launched(step + 1, lr, pending, self._work.batch_facts())
        if step + 1 == self._total_steps:
            self._resolve()

    def _resolve(self) -> None:
        """Read the step in flight, if there is one: the only wait for the device."""
        if self._launched is None:
            return
        launched, self._launched = self._launched, None
        metrics = launched.pending.result()
        self._progress.tokens_seen += 0 if metrics.skipped else metrics.tokens
        self._broken.watch(launched.step, metrics, last_good=self._last_good)
        self._loss = metrics.loss
        if launched.step % self._config.log.every_steps == 0 or launched.step == self._total_steps:
            self._write_metrics(launched, metrics)

    def _last_good(self) -> Path | None:
        self._note_finished_save(wait=True)
        return self._checkpoint

    def _write_metrics(self, launched: _Launched, metrics: StepMetrics) -> None:
        now = self._clock()
        seconds = now - self._interval.begun - self._interval.aside_seconds
        tokens = self._interval.tokens
        memory = self._session.memory()
        self._log.metrics(
            {
                "step": launched.step,
                "loss": finite(metrics.loss),
                "bits_per_byte": self._train_bits_per_byte(metrics.loss),
                "lr": launched.lr,
                "grad_norm": finite(metrics.grad_norm),
                "tokens_per_second": tokens / seconds if tokens and seconds > 0 else None,
                "tokens_seen": self._progress.tokens_seen,
                "data_wait_seconds": self._interval.data_wait_seconds,
                "memory_bytes": memory.current_bytes,
                "peak_memory_bytes": memory.peak_bytes,
                "elapsed_seconds": self._elapsed(),
                **launched.facts,
            }
        )
        self._interval = Interval(now)

    def _evaluation_due(self) -> bool:
        every, step = self._config.eval.every_steps, self._progress.step
        return step == self._total_steps or (every > 0 and step % every == 0)

    def _evaluate(self) -> None:
        if self._work.validation is None:
            return
        self._resolve()
        with self._aside() as seconds:
            measured = held_out_loss(
                self._session, self._work.validation, self._config.eval.batches
            )
        self._held_out = measured
        self._evaluated_step = self._progress.step
        self._log.evaluation(
            {
                "step": self._progress.step,
                "loss": finite(measured.loss),
                "bits_per_byte": finite(measured.bits_per_byte),
                "targets": measured.targets,
                "seconds": seconds(),
                **measured.facts,
            }
        )

    def _samples_due(self) -> bool:
        every, step = self._config.eval.sample_every_steps, self._progress.step
        if every > 0:
            return step % every == 0 or step == self._total_steps
        return step in {self._total_steps // 4, self._total_steps // 2, self._total_steps}

    def _write_samples(self) -> None:
        self._resolve()
        work = self._work
        with self._aside():
            drawn = samples(
                self._session, work.tokenizer, work.model, self._config.eval, is_chat=work.is_chat
            )
        for sample in drawn:
            self._log.sample({"step": self._progress.step, **sample._asdict()})

    def _save_due(self) -> bool:
        table, step = self._config.checkpoint, self._progress.step
        waited = self._clock() - self._last_save
        return (
            step == self._total_steps
            or (table.every_steps > 0 and step % table.every_steps == 0)
            or (table.every_minutes > 0 and waited >= 60.0 * table.every_minutes)
        )

    def _save(self, *, rank: bool) -> None:
        """Start a save of this step, once the one before has ended. With `rank` the step is
        evaluated first, so that the best is chosen among checkpoints that exist."""
        self._resolve()
        if rank and self._config.checkpoint.keep_best:
            self._rank()
        with self._aside():
            self._note_finished_save(wait=True)
            snapshot = self._session.snapshot()
            best = self._progress.best_step
            keep = () if best is None else (best,)
            self._writer.submit(snapshot, self._state(snapshot.session_state), keep)
            if snapshot.is_live:
                self._note_finished_save(wait=True)
        self._saved_step, self._last_save = self._progress.step, self._clock()

    def _rank(self) -> None:
        if self._evaluated_step != self._progress.step:
            self._evaluate()
        if self._held_out is None or not math.isfinite(self._held_out.loss):
            return
        best = self._progress.best_loss
        if best is None or self._held_out.loss < best:
            self._progress.best_loss = self._held_out.loss
            self._progress.best_step = self._progress.step

    def _note_finished_save(self, *, wait: bool = False) -> None:
        saved = self._writer.finished(wait=wait)
        if saved is not None:
            self._checkpoint = saved.path
            name, seconds = saved.path.name, saved.seconds
            self._log.event("checkpoint_saved", step=saved.step, path=name, seconds=seconds)
            for reason in saved.undeleted:
                self._log.event("checkpoint_not_deleted", reason=reason)

    def _heed_the_machine(self) -> StopCause | None:
        """Do what its watch asks for: write down, let caches go, pause. Gives a cause to stop."""
        watch = self._work.watch
        if watch is None:
            return None
        heed = watch.after_step()
        for row in heed.events:
            self._log.event(**{**row, "step": self._progress.step})
        if heed.release_cache:
            self._session.release_cache()
        if heed.pause_seconds:
            watch.pause(heed.pause_seconds)
        return heed.stop or None

    def _stop_if_asked(self, stop: StopRequest) -> None:
        """Stop where a signal or the machine asks for it: all ranks, if one of them is asked."""
        causes, cause = tuple(STOP_FIXES), self._heed_the_machine()
        place = causes.index(cause) if cause else -1
        asked = self._work.ranks.largest(place, stop.signal_number or 0)
        if asked[0] >= 0:
            self._stop_for(causes[int(asked[0])])
        if asked[1]:
            self._stop(int(asked[1]))

    def _stop_for(self, cause: StopCause) -> None:
        self._save_for_a_stop()
        self._log.event("stopped", step=self._progress.step, cause=cause)
        raise Stopped(
            f"stopped for {cause.replace('_', ' ')} after step {self._progress.step} of"
            f" {self._total_steps}; saved",
            fix=f"{STOP_FIXES[cause]}, then `solollm resume {quoted(self._run.path)}` goes on",
        )

    def _stop(self, signal_number: int) -> None:
        self._save_for_a_stop()
        name = signal.Signals(signal_number).name
        self._log.event("stopped", step=self._progress.step, signal=name)
        raise StoppedBySignal(
            f"stopped by {name} after step {self._progress.step} of {self._total_steps}; saved",
            signal_number=signal_number,
            fix=f"`solollm resume {quoted(self._run.path)}` goes on",
        )

    def _save_for_a_stop(self) -> None:
        """Save this step, then add to the checkpoint what comes next."""
        self._resolve()
        if self._saved_step != self._progress.step:
            self._save(rank=False)
        self._note_finished_save(wait=True)
        assert self._checkpoint is not None, "a stop has saved"
        work, step = self._work, self._progress.step
        path = self._checkpoint if self._run.writes else None
        if problem := promise(path, work.session, work.stream, step):
            self._log.event("continuation_missing", reason=problem)

    def _state(self, session_state: Mapping[str, int | float]) -> TrainerState:
        progress = self._progress
        return TrainerState(
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            session_state=dict(session_state),
            data=DataPosition(
                fingerprint=self._work.stream.fingerprint,
                seed=self._config.train.seed,
                step=progress.step,
            ),
            best_loss=progress.best_loss,
            best_step=progress.best_step,
            elapsed_seconds=self._elapsed(),
            environment=self._work.environment,
        )

    def _result(self) -> TrainResult:
        assert self._checkpoint is not None, "the last step is always saved"
        ranks, path = self._work.ranks, self._run.path
        return TrainResult(path, self._checkpoint, rank=ranks.rank, **self._summary())

    def _summary(self) -> dict[str, Any]:
        measured = self._held_out
        return {
            "start_step": self._start_step,
            "step": self._progress.step,
            "tokens_seen": self._progress.tokens_seen,
            "loss": self._loss,
            "validation_loss": measured.loss if measured else None,
            "bits_per_byte": finite(measured.bits_per_byte) if measured else None,
            "best_step": self._progress.best_step,
            "elapsed_seconds": self._elapsed(),
        }

    def _train_bits_per_byte(self, loss: float) -> float | None:
        ratio = self._work.bytes_per_target
        return finite(bits_per_byte(loss, ratio)) if ratio else None

    def _elapsed(self) -> float:
        return self._elapsed_before + self._clock() - self._began

    @contextmanager
    def _aside(self) -> Iterator[Callable[[], float]]:
        """Time that is not training, kept out of tokens per second; yields its clock."""
        begun = self._clock()
        yield lambda: self._clock() - begun
        self._interval.aside_seconds += self._clock() - begun
