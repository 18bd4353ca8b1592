"""This machine's speed, measured: what one optimizer step takes here, from steps of smaller models.

A step's time is a sum of parts that repeat: per update, per micro-batch, and each of them per
layer. Steps with few layers and one or a few micro-batches are enough to solve for the four parts,
so a model that takes minutes per step is forecast from seconds of measuring, on any backend. The
widths, the rows and the vocabulary are those of the model in question; only its depth is cut.

Rates are kept in the user's cache folder, so that later plans of this machine need not measure.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solollm import durable
from solollm.architecture import ModelConfig
from solollm.backend import (
    Backend,
    Batch,
    InitialWeights,
    Objective,
    Plan,
    SessionOptions,
    TrainSession,
)
from solollm.errors import SoloLLMError
from solollm.preference import rows_at_once

WARM_UP_STEPS = 1
LEAST_STEPS = 3  # per measured variant
_MOST_LAYERS = 8  # of the deeper variant
_MOST_MICRO_BATCHES = 4  # of the longer variant
# (rows, seq_len) -> a batch of that shape
SampleBatch = Callable[[int, int], Batch]


class Variant(NamedTuple):
    """A smaller step that is measured: so many layers and micro-batches."""

    layers: int
    micro_batches: int


class Seconds(NamedTuple):
    """Medians over the measured steps: of the process's processors, and of the clock."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Parts:
    """Seconds of a step's parts: per update and per micro-batch, each with a share per layer."""

    update: float
    update_layer: float
    micro_batch: float
    micro_batch_layer: float

    def step(self, layers: int, micro_batches: int) -> float:
        """Seconds of a step with so many layers and micro-batches."""
        update = self.update + self.update_layer * layers
        return update + micro_batches * (self.micro_batch + self.micro_batch_layer * layers)


@dataclass(frozen=True)
class Calibration:
    """What was measured for one model shape and plan: seconds of its step, and from which."""

    cpu: Parts
    wall: Parts
    measured: Mapping[Variant, Seconds]
    layers: int
    micro_batches: int

    @property
    def step_cpu_seconds(self) -> float:
        return self.cpu.step(self.layers, self.micro_batches)

    @property
    def step_seconds(self) -> float:
        return self.wall.step(self.layers, self.micro_batches)


def calibrate(
    backend: Backend,
    model: ModelConfig,
    options: SessionOptions,
    plan: Plan,
    *,
    sample_batch: SampleBatch,
    steps: int,
) -> Calibration:
    """Measure `steps` steps in all, spread over the variants of this model.

    Raises:
        BackendError, PlanError: from the session, as training would.
    """
    micro_batches = -(-plan.batch_size // plan.micro_batch_size)
    variants = _variants(model.num_hidden_layers, micro_batches)
    count = max(LEAST_STEPS, steps // len(variants))
    at_once = rows_at_once(options.objective, plan.micro_batch_size)
    batches = {
        n: sample_batch(at_once * n, plan.seq_len) for n in {v.micro_batches for v in variants}
    }
    with ExitStack() as stack:  # half and a quarter of the model at the same time
        sessions = {}
        for layers in sorted({variant.layers for variant in variants}):
            cut = model.model_copy(update={"num_hidden_layers": layers})
            session = stack.enter_context(closing(backend.train_session(cut, options, plan)))
            if options.adapter is not None:
                session.import_base(InitialWeights(cut, options.seed))
            sessions[layers] = session
        measured = _measure(variants, sessions, batches, count)
    return Calibration(
        cpu=solve({v: s.cpu for v, s in measured.items()}),
        wall=solve({v: s.wall for v, s in measured.items()}),
        measured=measured,
        layers=model.num_hidden_layers,
        micro_batches=micro_batches,
    )


def synthetic_batch(
    model: ModelConfig, rows: int, seq_len: int, *, objective: Objective = "lm"
) -> Batch:
    """Random ids in documents of uneven length: work of the size that real text makes. For DPO and
    GRPO with a reference, whose values change nothing about it."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, model.vocab_size, (rows, seq_len + 1), dtype=np.int32)
    borders = generator.random((rows, seq_len)) < 2.0 / seq_len
    batch = Batch(
        input_ids=np.ascontiguousarray(ids[:, :-1]),
        labels=np.ascontiguousarray(ids[:, 1:]),
        denominator=float(rows * seq_len),
        segment_ids=np.cumsum(borders, axis=1, dtype=np.int32),
    )
    if objective == "lm":
        return batch
    zeros, pairs = np.zeros((rows, seq_len), np.float32), np.arange(rows, dtype=np.int32) // 2
    return replace(
        batch,
        reference_logprobs=zeros,
        advantages=zeros if objective == "grpo" else None,
        pair_ids=pairs if objective == "dpo" else None,
    )


def solve(seconds: Mapping[Variant, float]) -> Parts:
    """The parts that give the measured steps: exactly, up to parts that noise made negative.

    Two depths tell layers from the rest, two counts of micro-batches tell these from the update.
    With one depth all is attributed to layers, with one micro-batch all to micro-batches.
    """
    depths = sorted({variant.layers for variant in seconds})
    fixed, sloped = {}, {}
    for count in sorted({variant.micro_batches for variant in seconds}):
        low = seconds[Variant(depths[0], count)]
        high = seconds[Variant(depths[-1], count)]
        if len(depths) == 1:
            fixed[count], sloped[count] = 0.0, low / depths[0]
            continue
        slope = max(0.0, (high - low) / (depths[-1] - depths[0]))
        fixed[count], sloped[count] = max(0.0, high - slope * depths[-1]), slope
    update, micro_batch = _line(fixed)
    update_layer, micro_batch_layer = _line(sloped)
    return Parts(update, update_layer, micro_batch, micro_batch_layer)


def _line(values: Mapping[int, float]) -> tuple[float, float]:
    """(constant, per micro-batch) of values by count of micro-batches, neither below zero."""
    counts = sorted(values)
    if len(counts) == 1:
        return 0.0, values[counts[0]] / counts[0]
    low, high = counts[0], counts[-1]
    slope = min(max(0.0, (values[high] - values[low]) / (high - low)), values[high] / high)
    return values[high] - slope * high, slope


def _variants(layers: int, micro_batches: int) -> list[Variant]:
    """Half and a quarter of the layers (both at least one and few), one micro-batch and up to four:
    of noise in the difference of two neighbours a plan of many would be a multiple."""
    deep = max(1, min(_MOST_LAYERS, math.ceil(layers / 2)))
    shallow = max(1, deep // 2)
    counts = sorted({1, min(_MOST_MICRO_BATCHES, micro_batches)})
    return [Variant(depth, count) for depth in sorted({shallow, deep}) for count in counts]


def _measure(
    variants: Sequence[Variant], sessions: Mapping[int, TrainSession],
    batches: Mapping[int, Batch], count: int,
) -> dict[Variant, Seconds]:  # fmt: skip
    """Steps of all variants in turns: a machine that slows down on the way slows all of them, and
    differences between them stay what they are. `sessions` by layers, `batches` by
    micro-batches."""
    spent: dict[Variant, list[Seconds]] = {variant: [] for variant in variants}
    for turn in range(WARM_UP_STEPS + count):
        for variant in variants:
            one = _time_step(sessions[variant.layers], batches[variant.micro_batches])
            if turn >= WARM_UP_STEPS:
                spent[variant].append(one)
    return {variant: Seconds(*map(statistics.median, zip(*all_, strict=True)))
            for variant, all_ in spent.items()}  # fmt: skip


def _time_step(session: TrainSession, batch: Batch) -> Seconds:
    begun_cpu, begun = time.process_time(), time.perf_counter()
    session.train_step(batch, lr=1e-4).result()
    _ = session.session_state  # an update that is still under way belongs to its step
    return Seconds(time.process_time() - begun_cpu, time.perf_counter() - begun)


class Rates:
    """Training rates of this machine by model width, kept in one small JSON file."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: default is `solollm/rates.json` in the user's cache folder."""
        folder = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self._path = path or Path(folder) / "solollm" / "rates.json"

    def add(self, key: str, width: int, flops: float) -> None:
        """Remember FLOP per second of models `width` wide. A cache that cannot be written is
        no reason to fail."""
        table = self._read()
        table.setdefault(key, {})[str(width)] = flops
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            durable.replace_file(self._path, json.dumps(table, indent=1).encode())
        except (OSError, SoloLLMError):
            return

    def nearest(self, key: str, width: int) -> float:
        """The rate measured at the width nearest to this one, 0 if there is none."""
        widths = {int(name): rate for name, rate in self._read().get(key, {}).items()}
        if not widths:
            return 0.0
        return widths[min(widths, key=lambda other: abs(math.log(other / width)))]

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            loaded = json.loads(self._path.read_text(encoding="utf-8"))
            return {
                str(key): {str(int(w)): float(rate) for w, rate in rates.items() if int(w) > 0}
                for key, rates in loaded.items()
            }
        except (OSError, ValueError, AttributeError, TypeError):
            return {}
