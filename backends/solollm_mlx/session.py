"""Training on MLX: two compiled functions of fixed shapes around fp32 masters.

`micro` adds the gradients of one micro-batch to an accumulator; `update` clips, skips or applies.
Each is evaluated before the next is called, so a step holds one micro-batch's activations however
many there are (one graph over all of them would hold all). Weights, states and accumulator are
plain dicts in table order: an order that comes from a file would change the order of the norm's
sum, and with it the bits of a resumed run.

Shapes: B rows of the global batch, M of a micro-batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import (
    IGNORED,
    Batch,
    Engine,
    EngineOptions,
    MemoryStats,
    PendingMetrics,
    Plan,
    SessionOptions,
    Snapshot,
    StepMetrics,
    TensorSource,
    TrainSession,
)
from solollm.errors import BackendError
from solollm_mlx import loss
from solollm_mlx.model import Weights, head_weight, hidden_states
from solollm_mlx.optim import Arrays, Optimizer
from solollm_mlx.state import MlxSnapshot, read_all

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
INITIAL_SCALE = 2.0**15  # fp16's loss scale; halved on overflow, doubled after SCALE_PATIENCE steps
SCALE_PATIENCE = 1000


class MicroBatch(NamedTuple):
    """One slice of rows on the device: ids and labels int32 [M, T], weights float32 [M, T] already
    divided by the denominator, segments int32 [M, T] or None."""

    input_ids: mx.array
    labels: mx.array
    token_weights: mx.array
    segments: mx.array | None


class _Pending(PendingMetrics):
    def __init__(self, loss: mx.array, norm: mx.array, skipped: mx.array, tokens: int) -> None:
        self._parts, self._tokens = (loss, norm, skipped), tokens

    def result(self) -> StepMetrics:
        mx.eval(*self._parts)
        loss, norm, skipped = (part.item() for part in self._parts)
        return StepMetrics(float(loss), float(norm), self._tokens, bool(skipped))


class MlxSession(TrainSession):
    """See `solollm.backend.TrainSession`. Data parallel over ranks started by `mlx.launch`."""

    def __init__(
        self, model: ModelConfig, options: SessionOptions, plan: Plan, group: mx.distributed.Group
    ) -> None:
        if options.objective != "lm" or options.adapter is not None:
            raise BackendError(
                f"the MLX backend trains no {options.objective} with adapter {options.adapter}",
                why="it has the language-model objective on all parameters",
                fix="choose objective lm without an adapter",
            )
        self._model, self._plan, self._group = model, plan, group
        self.rank, self.world_size = group.rank(), group.size()
        self._dtype = DTYPES[plan.compute_dtype]
        self._optimizer = Optimizer(model, options.optimizer)
        self._weights: Weights = {
            n: mx.array(a) for n, a in initial_parameters(model, options.seed)
        }
        self._states: Arrays = self._optimizer.initial_states()
        self._counters: Arrays = self._initial_counters()
        compiled = bool(options.backend_options.get("compile", True))
        wrap: Callable[..., Callable[..., tuple[mx.array, ...]]] = (
            mx.compile if compiled else lambda function: function
        )
        self._micro = wrap(self._micro_gradients)
        self._accumulate = wrap(lambda total, new: {n: total[n] + new[n] for n in total})
        self._update = wrap(self._apply)
        self._evaluate = wrap(self._token_logprobs)
        mx.eval(self._weights, self._states, self._counters)

    # -- the two functions ------------------------------------------------------------------------

    def _loss(self, weights: Weights, micro: tuple[mx.array | None, ...]) -> mx.array:
        input_ids, labels, token_weights, segments = micro
        hidden = hidden_states(
            weights, input_ids, segments, config=self._model, dtype=self._dtype,
            checkpointing=self._plan.activation_checkpointing,
        )  # fmt: skip
        hidden = hidden.reshape(-1, hidden.shape[-1])  # [M T, C]
        return loss.summed_loss(
            hidden, head_weight(weights), labels.reshape(-1), token_weights.reshape(-1)
        )

    def _micro_gradients(
        self, weights: Weights, scale: mx.array, *micro: mx.array | None
    ) -> tuple[mx.array, Arrays]:
        """(loss, gradients times scale), both summed over the micro-batch."""

        def scaled(weights: Weights) -> mx.array:
            return self._loss(weights, micro) * scale

        value, gradients = mx.value_and_grad(scaled)(weights)
        return value / scale, gradients

    def _apply(
        self, weights: Weights, states: Arrays, counters: Arrays, gradients: Arrays,
        total: mx.array, lr: mx.array,
    ) -> tuple[Weights, Arrays, Arrays, mx.array, mx.array]:  # fmt: skip
        table = self._optimizer.table
        gradients = {n: gradients[n] / counters["loss_scale"] for n in weights}
        norm = mx.sqrt(sum(mx.sum(mx.square(g)) for g in gradients.values()))
        finite = mx.isfinite(norm) & mx.isfinite(total)
        if table.clip_norm > 0:
            reference = counters["lagged_norm"] if table.clip == "lagged" else norm
            factor = mx.minimum(table.clip_norm / (reference + 1e-6), 1.0)
            gradients = {n: g * factor for n, g in gradients.items()}
        new_weights, new_states = self._optimizer.update(
            weights, states, gradients, lr=lr, updates=counters["updates"]
        )
        weights = {n: mx.where(finite, new_weights[n], weights[n]) for n in weights}
        states = {n: mx.where(finite, new_states[n], states[n]) for n in states}
        return weights, states, self._count(counters, finite, norm), norm, mx.logical_not(finite)

    def _count(self, counters: Arrays, finite: mx.array, norm: mx.array) -> Arrays:
        updates = counters["updates"] + finite.astype(mx.int32)
        lagged = mx.where(finite, norm, counters["lagged_norm"])
        scale, good = counters["loss_scale"], counters["scale_steps"]
        if self._dtype == mx.float16:
            good = mx.where(finite, good + 1, 0)
            grown = mx.where(good >= SCALE_PATIENCE, scale * 2, scale)
            scale = mx.where(finite, grown, mx.maximum(scale / 2, 1.0))
            good = mx.where(good >= SCALE_PATIENCE, 0, good)
        return {"updates": updates, "lagged_norm": lagged, "loss_scale": scale, "scale_steps": good}

    def _token_logprobs(self, weights: Weights, *micro: mx.array | None) -> mx.array:
        input_ids, labels, _, segments = micro
        hidden = hidden_states(weights, input_ids, segments, config=self._model, dtype=self._dtype)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return loss.token_logprobs(flat, head_weight(weights), labels.reshape(-1))

    # -- the seam ---------------------------------------------------------------------------------

    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        total, gradients = self._gradients(batch)
        self._weights, self._states, self._counters, norm, skipped = self._update(
            self._weights, self._states, self._counters, gradients, total, mx.array(lr, mx.float32)
        )
        del gradients
        # Handles must hold no graph: what they wait for is on its way when the step returns.
        mx.async_eval(self._weights, self._states, self._counters, total, norm, skipped)
        return _Pending(total, norm, skipped, batch.num_targets)

    def probe_step(self, batch: Batch) -> StepMetrics:
        total, gradients = self._gradients(batch)
        scale = self._counters["loss_scale"]
        norm = mx.sqrt(sum(mx.sum(mx.square(g / scale)) for g in gradients.values()))
        finite = mx.isfinite(norm) & mx.isfinite(total)
        return _Pending(total, norm, mx.logical_not(finite), batch.num_targets).result()

    def gradients(self, batch: Batch) -> dict[str, mx.array]:
        """The batch's gradients by canonical name, unclipped: for parity tests."""
        _, gradients = self._gradients(batch)
        return {n: g / self._counters["loss_scale"] for n, g in gradients.items()}

    def _gradients(self, batch: Batch) -> tuple[mx.array, Arrays]:
        total: mx.array = mx.zeros((), mx.float32)
        gradients: Arrays = {}
        for micro in self._micro_batches(batch):
            value, new = self._micro(self._weights, self._counters["loss_scale"], *micro)
            total = total + value
            gradients = self._accumulate(gradients, new) if gradients else new
            mx.eval(total, gradients)
        if self.world_size > 1:
            total = mx.distributed.all_sum(total, group=self._group, stream=mx.cpu)
            gradients = {
                n: mx.distributed.all_sum(g, group=self._group, stream=mx.cpu)
                for n, g in gradients.items()
            }
            mx.eval(total, gradients)
        return total, gradients

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        logprobs = self.token_logprobs(batch)
        return float(-logprobs.sum(dtype=np.float64)), batch.num_targets

    def token_logprobs(self, batch: Batch, *, adapter: bool = True) -> np.ndarray:
        rows, length = batch.input_ids.shape
        parts = []
        for micro in self._micro_batches(batch, all_rows=True):
            parts.append(np.array(self._evaluate(self._weights, *micro)).reshape(-1, length))
        return np.concatenate(parts)[:rows]

    def _micro_batches(self, batch: Batch, *, all_rows: bool = False) -> list[MicroBatch]:
        """This rank's rows in slices of one fixed shape; the last is filled with rows that have no
        target, since a new shape would be compiled anew."""
        rows = len(batch.input_ids)
        first, last = 0, rows
        if not all_rows:
            first = rows * self.rank // self.world_size
            last = rows * (self.rank + 1) // self.world_size
        size = self._plan.micro_batch_size
        weights = np.full(batch.labels.shape, 1.0 / batch.denominator, np.float32)
        if batch.token_weights is not None:
            weights = (batch.token_weights / batch.denominator).astype(np.float32)

        def slices(array: np.ndarray | None, fill: int, start: int) -> mx.array | None:
            if array is None:
                return None
            part = array[start : min(start + size, last)]
            if len(part) < size:
                padding = np.full((size - len(part), array.shape[1]), fill, array.dtype)
                part = np.concatenate([part, padding])
            return mx.array(part)

        return [
            MicroBatch(
                slices(batch.input_ids, 0, start), slices(batch.labels, IGNORED, start),
                slices(weights, 0, start), slices(batch.segment_ids, 0, start),
            )
            for start in range(first, max(last, first + 1), size)
        ]  # fmt: skip

    def engine(self, options: EngineOptions) -> Engine:
        from solollm_mlx.engine import MlxEngine

        return MlxEngine.over_weights(self._weights, self._model, options)

    def snapshot(self) -> Snapshot:
        mx.eval(self._weights, self._states, self._counters)
        return MlxSnapshot(self._weights, self._states, self.session_state)

    def import_parameters(self, source: TensorSource) -> None:
        shapes = {n: (mx.float32, tuple(a.shape)) for n, a in self._weights.items()}
        self._weights = read_all(source, shapes, what="weights")

    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        states = read_all(source, self._optimizer.state_shapes(), what="optimizer state")
        self._states = states
        counters = self._initial_counters()
        self._counters = {
            name: mx.array(state.get(name, initial.item()), initial.dtype)
            for name, initial in counters.items()
        }
        mx.eval(self._counters)

    @property
    def session_state(self) -> Mapping[str, int | float]:
        return {name: array.item() for name, array in self._counters.items()}

    def _initial_counters(self) -> Arrays:
        scale = INITIAL_SCALE if self._dtype == mx.float16 else 1.0
        return {
            "updates": mx.array(0, mx.int32),
            "lagged_norm": mx.array(0.0, mx.float32),
            "loss_scale": mx.array(scale, mx.float32),
            "scale_steps": mx.array(0, mx.int32),
        }

    def memory(self) -> MemoryStats:
        return MemoryStats(mx.get_active_memory(), mx.get_peak_memory())

    def close(self) -> None:
        self._weights, self._states = {}, {}
        mx.clear_cache()
