"""What a trainer is given, where it stands, and what it gives back: values only.

The loop over them is `solollm.trainer`; what makes them of a config is `solollm.pretraining`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from solollm.architecture import ModelConfig
from solollm.backend import Batch, Ranks, TrainSession
from solollm.checkpoint import Checkpoint, Environment
from solollm.checkpoint_writer import CheckpointContents
from solollm.data.stream import EpochStream, StepStream
from solollm.frozen_base import TrainedAdapter
from solollm.run_log import Row
from solollm.runs import Run
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

    @classmethod
    def of(cls, checkpoint: Checkpoint | None) -> Progress:
        """Where a checkpoint stands; None: at the start."""
        if checkpoint is None:
            return cls()
        state = checkpoint.state
        return cls(
            step=state.step,
            tokens_seen=state.tokens_seen,
            best_loss=state.best_loss,
            best_step=state.best_step,
            elapsed_seconds=state.elapsed_seconds,
        )


@dataclass
class Interval:
    """What has happened since the last train row. Tokens count when their step is launched: a
    session that computes inside `train_step` has then done them, any other is one step behind."""

    begun: float
    tokens: int = 0
    data_wait_seconds: float = 0.0
    aside_seconds: float = 0.0  # evaluations, samples and waits for a save: no training


class Completing(Protocol):
    """Makes the batch of a step out of the stream's, with the session's weights as they are then
    (GRPO's rollouts). `facts`: of the last one, for the step's row in the log."""

    facts: dict[str, float]

    def batch(self, step: int, batch: Batch) -> Batch: ...


@dataclass(frozen=True)
class Workload:
    """What a trainer works on. `environment`, what a bitwise resume depends on, is stored in every
    checkpoint; `facts` are told to sinks at the start, then `notes`, as events. A session that is
    `rehearsed` needs no dry run. `adapter` and `generation` are for the checkpoints of a
    fine-tuning (`CheckpointContents`), whose samples are answers: `is_chat`. `watch` looks after
    the machine; None: nobody does. `completing` adds to a batch what depends on the weights."""

    session: TrainSession
    stream: StepStream
    model: ModelConfig
    tokenizer: Tokenizer
    environment: Environment
    bytes_per_target: float | None = None  # of the training text; None: no bits per byte
    validation: EpochStream | None = None
    facts: Row = field(default_factory=dict)
    notes: Sequence[Row] = ()
    rehearsed: bool = False
    adapter: TrainedAdapter | None = None
    generation: Mapping[str, Any] | None = None
    is_chat: bool = False
    watch: Watch | None = None
    completing: Completing | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def ready(self, step: int, batch: Batch) -> Batch:
        """The batch of a step as it is trained on now."""
        return batch if self.completing is None else self.completing.batch(step, batch)

    def batch_facts(self) -> dict[str, float]:
        """What is known of the last batch that was made ready."""
        return {} if self.completing is None else dict(self.completing.facts)

    def contents(self) -> CheckpointContents:
        """What every checkpoint holds besides tensors and state."""
        return CheckpointContents(
            self.model, self.tokenizer.files(), self.tokenizer.token_ids,
            generation=self.generation, adapter=self.adapter,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses in nats per token; None where nothing was measured. `rank`: which of
    the run's processes says so; 0 speaks for all."""

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
    rank: int = 0

    @classmethod
    def read(cls, run: Run, checkpoint: Checkpoint) -> TrainResult:
        """The result of a run that has nothing left to do, read back from its files."""
        rows = run.read_metrics()
        trained = [row for row in rows if row.get("kind") == "train"]
        measured = [row for row in rows if row.get("kind") == "eval"]
        return cls(
            run=run.path,
            checkpoint=checkpoint.path,
            start_step=checkpoint.step,
            step=checkpoint.step,
            tokens_seen=checkpoint.state.tokens_seen,
            loss=trained[-1].get("loss") if trained else None,
            validation_loss=measured[-1].get("loss") if measured else None,
            bits_per_byte=measured[-1].get("bits_per_byte") if measured else None,
            best_step=checkpoint.state.best_step,
            elapsed_seconds=checkpoint.state.elapsed_seconds,
        )
