"""What a trainer is given, where it stands, and what it gives back: values only.

The loop over them is `solollm.trainer`; what makes them of a config is `solollm.pretraining`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from solollm.architecture import ModelConfig
from solollm.backend import TrainSession
from solollm.checkpoint import Environment
from solollm.data.stream import BatchStream, StepStream
from solollm.run_log import Row
from solollm.tokenizer import Tokenizer
from solollm.watch import Watch


@dataclass
class Progress:
    """Where a run stands: what a checkpoint stores of the loop, and a resumed loop starts from."""

    step: int = 0
    tokens_seen: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    elapsed_seconds: float = 0.0


@dataclass(frozen=True)
class Workload:
    """What a trainer works on. `environment`, what a bitwise resume depends on, is stored in every
    checkpoint; `facts` are told to sinks at the start, then `notes`, as events. A session that is
    `rehearsed` needs no dry run. `watch` looks after the machine; None: nobody does."""

    session: TrainSession
    stream: StepStream
    model: ModelConfig
    tokenizer: Tokenizer
    environment: Environment
    bytes_per_target: float | None = None  # of the training text; None: no bits per byte
    validation: BatchStream | None = None
    facts: Row = field(default_factory=dict)
    notes: Sequence[Row] = ()
    rehearsed: bool = False
    watch: Watch | None = None


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses in nats per token; None where nothing was measured."""

    run: Path
    checkpoint: Path
    start_step: int
    step: int
    tokens_seen: int
    loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    best_step: int | None
    elapsed_seconds: float
