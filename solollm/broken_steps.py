"""Steps that were not finite: skipped whole, or half applied and undone.

With exact clipping a session leaves its state as it was, and the run goes on with the next batch.
With lagged clipping some blocks may have been updated before the first bad gradient was seen
(`StepMetrics.partial`): the run goes back to its last checkpoint and takes the same way again, but
around that batch, which is then the same as if it had been skipped whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from solollm.backend import StepMetrics, TrainSession
from solollm.checkpoint import Checkpoint, latest_checkpoint
from solollm.errors import SoloLLMError, quoted
from solollm.run_log import RunLog, finite
from solollm.runs import Run

MAX_CONSECUTIVE_SKIPS = 10
MAX_RETURNS = 3  # to one checkpoint


class HalfAppliedError(Exception):
    """The step whose update must be undone; caught by the loop, never shown."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step} was applied to some blocks only")
        self.step = step


class BrokenSteps:
    """Counts them, and knows which batches to go around."""

    def __init__(self, run: Run, log: RunLog) -> None:
        self._run, self._log = run, log
        self._in_a_row = 0
        self._around: set[int] = set()
        self._returns: dict[int, int] = {}

    def is_passed_over(self, step: int) -> bool:
        """Whether the batch that makes step `step` is left out."""
        return step in self._around

    def watch(
        self, step: int, metrics: StepMetrics, *, last_good: Callable[[], Path | None]
    ) -> None:
        """Note how a step went. `last_good`: the newest checkpoint, once every save has ended.

        Raises:
            HalfAppliedError: `go_back` must be next.
            SoloLLMError: ten in a row were not finite.
        """
        if not metrics.skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._log.event(
            "step_skipped", step=step, loss=finite(metrics.loss),
            grad_norm=finite(metrics.grad_norm), in_a_row=self._in_a_row,
        )  # fmt: skip
        if self._in_a_row >= MAX_CONSECUTIVE_SKIPS:
            raise SoloLLMError(
                f"{self._in_a_row} steps in a row, up to step {step}, were not finite",
                why="the weights or the numerics are broken; waiting does not mend them",
                fix=f"the last good checkpoint is {last_good() or 'none yet'}; go on from it"
                " with a lower optimizer.lr: `solollm pretrain --init-from CHECKPOINT`",
            )
        if metrics.partial:
            raise HalfAppliedError(step)

    def go_back(self, step: int, session: TrainSession) -> Checkpoint:
        """Put `session` into the state of the last checkpoint, from where step `step` is left out.
        Gives the checkpoint, closed; the caller takes its counters.

        Raises:
            SoloLLMError: there is none, or it was come back to three times already.
        """
        checkpoint, _ = latest_checkpoint(self._run.checkpoints)
        if checkpoint is None:
            raise SoloLLMError(
                f"step {step} was not finite, and half of its update is applied",
                why="with optimizer.clip = lagged that is undone by going back to a checkpoint, and"
                " there is none yet",
                fix="start again with a lower optimizer.lr, or with optimizer.clip = exact",
            )
        returns = self._returns[checkpoint.step] = self._returns.get(checkpoint.step, 0) + 1
        if returns > MAX_RETURNS:
            raise SoloLLMError(
                f"the run went back to step {checkpoint.step} {MAX_RETURNS} times, and step {step}"
                " is not finite either",
                why="the weights or the numerics are broken; another batch does not mend them",
                fix=f"go on from {checkpoint.path} with a lower optimizer.lr:"
                f" `solollm pretrain --init-from {quoted(checkpoint.path)}`",
            )
        session.import_parameters(checkpoint.parameters())
        session.import_optimizer(checkpoint.optimizer(), checkpoint.state.session_state)
        checkpoint.close()
        self._around.add(step)
        self._log.event("rolled_back", step=step, to_step=checkpoint.step)
        return checkpoint
