"""Training on MLX: compiled functions of fixed shapes around fp32 masters.

`_micro_gradients` takes the gradients of one micro-batch, `_judge` their norm and whether the step
counts, the optimizer applies it. Each micro-batch is evaluated before the next is begun, so a step
holds one micro-batch's activations however many there are (one graph over all of them would hold
all). Weights and states are plain dicts in table order: an order that comes from a file would
change the order of the norm's sum, and with it the bits of a resumed run.

The optimizer is `optim`, the decoder `model`, the loss `loss`, the bits on the host `state`; a
frozen base with an adapter is `adapter_session`.

Shapes: B rows of the global batch, M of a micro-batch, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from solollm.adapters import trained_table
from solollm.architecture import ModelConfig, initial_parameters
from solollm.backend import (
    IGNORED,
    Batch,
    Copies,
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
from solollm.errors import BackendError, ConfigError, nearest
from solollm.preference import require_fields, rows_at_once
from solollm_mlx import loss
from solollm_mlx.compiling import should_compile
from solollm_mlx.limits import bounded_run_ahead
from solollm_mlx.memory import step_bytes
from solollm_mlx.model import Projection, Weights, head_weight, hidden_states, project
from solollm_mlx.optim import GROUP_ELEMENTS, Arrays, Optimizer, Step
from solollm_mlx.preference import HostTerms, Preference, Terms
from solollm_mlx.ranks import lost_ranks_named
from solollm_mlx.state import MlxSnapshot, read_states, read_weights

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
OPTIONS = ("compile",)
INITIAL_SCALE = 2.0**15  # fp16's loss scale; halved on overflow, doubled after SCALE_PATIENCE steps
SCALE_PATIENCE = 1000


class MicroBatch(NamedTuple):
    """One slice of rows on the device: ids and labels int32 [M, T], weights float32 [M, T] already
    divided by the denominator, segments int32 [M, T] or None; terms: of DPO and GRPO."""

    input_ids: mx.array
    labels: mx.array
    token_weights: mx.array
    segments: mx.array | None
    terms: Terms | None = None


class _Pending(PendingMetrics):
    def __init__(self, numbers: mx.array, tokens: int) -> None:
        """`numbers`: float32 [loss, gradient norm, 1 if the step was skipped]."""
        self._numbers, self._tokens = numbers, tokens

    def result(self) -> StepMetrics:
        with lost_ranks_named():
            total, norm, skipped = np.array(self._numbers).tolist()
        return StepMetrics(total, norm, self._tokens, bool(skipped))


class MlxSession(TrainSession):
    """See `solollm.backend.TrainSession`. Data parallel over ranks started by `mlx.launch`.

    `options.backend_options`: `compile` (auto, true, false; see `compiling`).
    """

    def __init__(
        self, model: ModelConfig, options: SessionOptions, plan: Plan, group: mx.distributed.Group
    ) -> None:
        """A session with the core's initial weights of `options.seed`.

        Raises:
            ConfigError: an unknown or unusable entry of `backend_options`.
        """
        _refuse_unsupported(options)
        self._model, self._plan, self._group = model, plan, group
        self.rank, self.world_size = group.rank(), group.size()
        self._dtype = DTYPES[plan.compute_dtype]
        self._step_bytes = step_bytes(model, options, plan)
        self._table = options.optimizer
        self._objective, self._preference = options.objective, Preference.of(options)
        self._compiled = should_compile(options.backend_options.get("compile", "auto"))
        self._optimizer = Optimizer(
            trained_table(model, options.adapter), options.optimizer, compiled=self._compiled
        )
        self._weights: Weights = self._initial_weights(options)
        self._frozen: Weights = {}  # what is computed with and not trained
        self._project: Projection = project
        self._summed_loss = loss.summed_loss
        self._states = self._optimizer.initial_states()
        self._counters = self._initial_counters()
        wrap: Any = mx.compile if self._compiled else lambda function: function
        self._micro = wrap(self._micro_gradients)
        self._add = wrap(_add)
        self._verdict = wrap(self._judge)
        self._evaluate = wrap(self._token_logprobs)
        mx.eval(self._weights, self._states)

    def _initial_weights(self, options: SessionOptions) -> Weights:
        initial = initial_parameters(self._model, options.seed)
        return {name: mx.array(array) for name, array in initial}

    @property
    def settings(self) -> Mapping[str, bool | int | float | str]:
        return {"compile": self._compiled}

    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        mx.eval(self._weights, self._states)  # an update under way would count as held for good
        with lost_ranks_named(), bounded_run_ahead(self._step_bytes):
            return self._train_step(batch, lr)

    def _train_step(self, batch: Batch, lr: float) -> PendingMetrics:
        total, gradients = self._gradients(batch)
        squares = summed_squares(gradients)
        numbers, factor, counters = self._verdict(total, squares, self._counters)
        step = Step.of(
            lr, self._table, updates=self._counters["updates"],
            factor=factor, skipped=numbers[2] > 0,
        )  # fmt: skip
        self._optimizer.step(self._weights, self._states, gradients, step)
        self._counters = counters
        # A handle must hold no graph: what it waits for is on its way when the step returns.
        mx.async_eval(self._weights, self._states, self._counters, numbers)
        return _Pending(numbers, batch.num_targets)

    def probe_step(self, batch: Batch) -> StepMetrics:
        with lost_ranks_named(), bounded_run_ahead(self._step_bytes):
            return self._probe_step(batch)

    def _probe_step(self, batch: Batch) -> StepMetrics:
        total, gradients = self._gradients(batch)
        numbers, _, _ = self._verdict(total, summed_squares(gradients), self._counters)
        return _Pending(numbers, batch.num_targets).result()

    def gradients(self, batch: Batch) -> Arrays:
        """The batch's gradients by canonical name, unclipped: for parity tests."""
        scale = self._counters.get("loss_scale", mx.array(1.0))
        return {name: array / scale for name, array in self._gradients(batch)[1].items()}

    def _gradients(self, batch: Batch) -> tuple[mx.array, Arrays]:
        """(loss, gradients times the loss scale) of the whole batch, over all ranks."""
        require_fields(batch, self._objective, self._preference.beta if self._preference else 0.0)
        total: mx.array = mx.zeros((), mx.float32)
        gradients: Arrays = {}
        for micro in self._micro_batches(batch, *self._own_rows(batch)):
            mx.eval(total, gradients)  # of the micro-batches before
            value, new = self._micro(self._weights, self._frozen, self._counters, micro)
            total = total + value
            gradients = self._add(gradients, new) if gradients else new
        if self.world_size > 1:
            total, gradients = self._sum_over_ranks(total, gradients)
        return total, gradients

    def _sum_over_ranks(self, total: mx.array, gradients: Arrays) -> tuple[mx.array, Arrays]:
        # On the CPU's stream: a GPU that waits for the network is ended by Apple's watchdog.
        def summed(array: mx.array) -> mx.array:
            return mx.distributed.all_sum(array, group=self._group, stream=mx.cpu)

        mx.eval(total, gradients)
        return summed(total), {name: summed(array) for name, array in gradients.items()}

    def _micro_gradients(
        self, weights: Weights, frozen: Weights, counters: Arrays, micro: MicroBatch
    ) -> tuple[mx.array, Arrays]:
        """(loss, gradients times the loss scale), summed over the micro-batch."""
        input_ids, labels, token_weights, segments, terms = micro
        scale = counters.get("loss_scale", mx.array(1.0))
        token_weights = (token_weights * scale).reshape(-1)

        def scaled_loss(weights: Weights) -> tuple[mx.array, mx.array]:
            whole = self._whole(weights, frozen)
            hidden = hidden_states(
                whole, input_ids, segments, config=self._model, dtype=self._dtype,
                checkpointing=self._plan.activation_checkpointing, project=self._project,
            )  # fmt: skip
            head = head_weight(whole)
            if self._preference is not None and terms is not None:
                return self._preference.summed_loss(
                    hidden, head, labels, terms=terms, scale=scale, follow=self._summed_loss
                )
            flat = hidden.reshape(-1, hidden.shape[-1])  # [M T, C]
            total = self._summed_loss(flat, head, labels.reshape(-1), token_weights)
            return total, total / scale

        gradient_function: Any = mx.value_and_grad(scaled_loss)  # its types know no dict
        total: mx.array
        (_, total), gradients = gradient_function(weights)
        return total, gradients

    def _whole(self, weights: Weights, frozen: Weights) -> Weights:
        """All that the decoder computes with, of what is trained and what is not."""
        return weights

    def _judge(
        self, total: mx.array, squares: mx.array, counters: Arrays
    ) -> tuple[mx.array, mx.array, Arrays]:
        """(the step's numbers, see `_Pending`; what the gradients are to be multiplied by; the
        counters after the step)."""
        scale = counters.get("loss_scale", mx.array(1.0))
        norm = mx.sqrt(squares) / scale
        skipped = mx.logical_not(mx.isfinite(norm) & mx.isfinite(total))
        numbers = mx.stack([total, norm, skipped.astype(mx.float32)])
        factor = mx.array(1.0)
        if self._table.clip_norm > 0:
            reference = counters["lagged_norm"] if self._table.clip == "lagged" else norm
            factor = mx.minimum(self._table.clip_norm / (reference + 1e-6), 1.0)
        return numbers, factor / scale, _count(counters, skipped, norm)

    def _token_logprobs(self, weights: Weights, frozen: Weights, micro: MicroBatch) -> mx.array:
        """float32 [M, T]: log p(label), 0 where there is no target."""
        input_ids, labels, _, segments, _ = micro
        whole = self._whole(weights, frozen)
        hidden = hidden_states(
            whole, input_ids, segments, config=self._model, dtype=self._dtype,
            project=self._project,
        )  # fmt: skip
        flat = hidden.reshape(-1, hidden.shape[-1])
        logprobs = loss.token_logprobs(flat, head_weight(whole), labels.reshape(-1))
        return logprobs.reshape(labels.shape)

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        logprobs = self.token_logprobs(batch)
        return float(-logprobs.sum(dtype=np.float64)), batch.num_targets

    def token_logprobs(self, batch: Batch, *, adapter: bool = True) -> np.ndarray:
        return self._logprobs_under(self._weights, batch)

    def _logprobs_under(self, weights: Weights, batch: Batch) -> np.ndarray:
        rows = len(batch.input_ids)
        parts = [
            np.array(self._evaluate(weights, self._frozen, micro))
            for micro in self._micro_batches(batch, 0, rows)
        ]
        return np.concatenate(parts)[:rows]

    def _own_rows(self, batch: Batch) -> tuple[int, int]:
        """First and last (exclusive) row of this rank's slice."""
        together = 2 if self._objective == "dpo" else 1  # a pair stays on one rank
        units = len(batch.input_ids) // together
        first, last = (units * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return first * together, last * together

    def _micro_batches(self, batch: Batch, first: int, last: int) -> Iterator[MicroBatch]:
        """Rows `first` to `last` in slices of one fixed shape; the last is filled with rows that
        have no target, since a new shape would be compiled anew."""
        size = rows_at_once(self._objective, self._plan.micro_batch_size)
        weights = np.full(batch.labels.shape, 1.0 / batch.denominator, np.float32)
        if batch.token_weights is not None:
            weights = (batch.token_weights / batch.denominator).astype(np.float32)

        terms = None if self._preference is None else HostTerms.of(batch)

        def filled(array: np.ndarray, fill: int, start: int) -> mx.array:
            part = array[start : min(start + size, last)]
            padding = np.full((size - len(part), array.shape[1]), fill, array.dtype)
            return mx.array(np.concatenate([part, padding]))

        for start in range(first, max(last, first + 1), size):
            segments = batch.segment_ids
            yield MicroBatch(
                filled(batch.input_ids, 0, start),
                filled(batch.labels, IGNORED, start),
                filled(weights, 0, start),
                None if segments is None else filled(segments, 0, start),
                None if terms is None else terms.uploaded(partial(filled, fill=0, start=start)),
            )

    def engine(self, options: EngineOptions) -> Engine:
        from solollm_mlx.engine import MlxEngine

        if options.compute_dtype == "auto":
            options = replace(options, compute_dtype=self._plan.compute_dtype)
        return MlxEngine(self._weights, self._model, options)

    def snapshot(self) -> Snapshot:
        mx.eval(self._weights, self._states)
        return MlxSnapshot(self._weights, self._states, self.session_state)

    def import_parameters(self, source: TensorSource) -> None:
        expected = {n: (mx.float32, tuple(a.shape)) for n, a in self._weights.items()}
        self._weights = read_weights(source, expected)

    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        self._states = read_states(source, self._optimizer.specs())
        self._counters = {
            name: mx.array(state.get(name, initial.item()), initial.dtype)
            for name, initial in self._initial_counters().items()
        }

    @property
    def session_state(self) -> Mapping[str, int | float]:
        return {name: np.array(array).item() for name, array in self._counters.items()}

    def _initial_counters(self) -> Arrays:
        counters = {"updates": mx.array(0, mx.int32), "lagged_norm": mx.array(0.0, mx.float32)}
        if self._dtype == mx.float16:
            counters["loss_scale"] = mx.array(INITIAL_SCALE, mx.float32)
            counters["scale_steps"] = mx.array(0, mx.int32)
        return counters

    def release_cache(self) -> None:
        mx.clear_cache()

    def copies(self) -> Copies:
        return Copies(0, 0)  # one memory for processor and GPU

    def memory(self) -> MemoryStats:
        return MemoryStats(mx.get_active_memory(), mx.get_peak_memory())

    def close(self) -> None:
        self._weights, self._frozen, self._states = {}, {}, {}
        mx.clear_cache()


def summed_squares(arrays: Arrays) -> mx.array:
    """The square of the norm of all arrays as one vector, float32 scalar. In groups: the squares
    are arrays of their own until they are summed."""
    sums: list[mx.array] = []
    elements = 0
    for array in arrays.values():
        if elements >= GROUP_ELEMENTS:
            mx.eval(sums)
            elements = 0
        sums.append(mx.sum(mx.square(array)))
        elements += array.size
    return mx.stack(sums).sum()


def _add(total: Arrays, new: Arrays) -> Arrays:
    return {name: array + new[name] for name, array in total.items()}


def _count(counters: Arrays, skipped: mx.array, norm: mx.array) -> Arrays:
    """The counters after a step; the loss scale follows Micikevicius et al. 2018,
    arXiv:1710.03740."""
    counted = {
        "updates": counters["updates"] + mx.logical_not(skipped).astype(mx.int32),
        "lagged_norm": mx.where(skipped, counters["lagged_norm"], norm),
    }
    if "loss_scale" in counters:
        steps = mx.where(skipped, 0, counters["scale_steps"] + 1)
        grows = steps >= SCALE_PATIENCE
        scale = mx.where(grows, counters["loss_scale"] * 2, counters["loss_scale"])
        counted["loss_scale"] = mx.where(skipped, mx.maximum(scale / 2, 1.0), scale)
        counted["scale_steps"] = mx.where(grows, 0, steps)
    return counted


def _refuse_unsupported(options: SessionOptions) -> None:
    if options.optimizer.state_bits == 16:
        raise BackendError(
            "the MLX backend does not hold optimizer states in 16 bits",
            why="unified memory has no copy to halve, and 8 bits take less",
            fix="set optimizer.state_bits to 8 or 32",
        )
    for key in options.backend_options:
        if key not in OPTIONS:
            raise ConfigError(f"unknown MLX backend option `{key}`", fix=nearest(key, OPTIONS))
