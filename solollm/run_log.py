"""What a run writes down: each row once into the run's files, then to everyone who watches.

The rows of `metrics.jsonl`; `step` counts finished steps, losses are nats per token, a value that
is not finite is null:

    kind "train"   step loss bits_per_byte lr grad_norm tokens_per_second tokens_seen
                   data_wait_seconds (since the last row) memory_bytes peak_memory_bytes
                   elapsed_seconds
    kind "eval"    step loss bits_per_byte targets seconds
    kind "sample"  step prompt text

The events of `events.jsonl`: step_skipped, rolled_back, checkpoint_saved, checkpoint_damaged,
checkpoint_not_deleted, resumed, stopped, environment_changed, sink_failed, report_failed;
continuation_proven, continuation_refused, continuation_missing (see `solollm.continuation`);
keep_awake, memory_pressure, heat, power (`solollm.watch`); fault (`solollm.faults`); restarted,
given_up (`solollm.supervisor`); failed (`solollm.ranks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from solollm.runs import Run

Row = Mapping[str, Any]  # values that JSON can hold


class Sink(Protocol):
    """Something that watches a run: the console, TensorBoard, a tracker. Called on the training
    thread, so it must be quick; one that raises is dropped and the run goes on."""

    def start(self, facts: Row) -> None:
        """Once, before the first step: run, start_step, total_steps, tokens_per_step,
        num_parameters, backend, device and more."""

    def metrics(self, row: Row) -> None:
        """A train row."""

    def evaluation(self, row: Row) -> None:
        """An eval row."""

    def sample(self, row: Row) -> None:
        """A sample row."""

    def event(self, row: Row) -> None:
        """An event; `kind` says which."""

    def finish(self, summary: Row) -> None:
        """Once, at the end. `status` is finished, stopped or failed; the rest is `TrainResult`'s
        numbers."""


class RunLog:
    """Writes rows and events of one run. The caller holds the run's lock."""

    def __init__(self, run: Run, sinks: Sequence[Sink] = ()) -> None:
        self._run = run
        self._sinks = list(sinks)

    def start(self, facts: Row) -> None:
        self._tell(lambda sink: sink.start(facts))

    def metrics(self, row: dict[str, Any]) -> None:
        row = {"kind": "train", **row}
        self._run.append_metrics(row)
        self._tell(lambda sink: sink.metrics(row))

    def evaluation(self, row: dict[str, Any]) -> None:
        row = {"kind": "eval", **row}
        self._run.append_metrics(row)
        self._tell(lambda sink: sink.evaluation(row))

    def sample(self, row: dict[str, Any]) -> None:
        row = {"kind": "sample", **row}
        self._run.append_metrics(row)
        self._tell(lambda sink: sink.sample(row))

    def event(self, kind: str, **fields: Any) -> None:
        self._run.append_event(kind, **fields)
        self._tell(lambda sink: sink.event({"kind": kind, **fields}))

    def finish(self, summary: Row) -> None:
        self._tell(lambda sink: sink.finish(summary))

    def _tell(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:  # a tracker that fails must not end days of training
                self._sinks.remove(sink)
                self._run.append_event("sink_failed", sink=type(sink).__name__, error=repr(error))


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
