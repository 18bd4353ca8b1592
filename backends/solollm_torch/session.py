"""Training on PyTorch: fp32 masters, gradients accumulated in place, one update per global batch.

A step has two halves. `train_step` queues forward and backward; the update is settled when its
metrics are asked for, or before anything else is done with the session. Only settling waits for the
device (it must know whether the step was finite), so the host prepares the next batch meanwhile.

The optimizer is `optim`, the decoder `model`, the loss `loss`, the bits on the host `state`; a
frozen base with an adapter is `adapter_session`.

Shapes: B rows of the global batch, M of a micro-batch, T positions, C hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from solollm.architecture import ModelConfig, initial_parameters, parameter_table
from solollm.backend import (
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
from solollm.errors import BackendError
from solollm.preference import rows_at_once
from solollm_torch.attention import Segments
from solollm_torch.compiling import compile_blocks, should_compile
from solollm_torch.fp8 import fp8_linear
from solollm_torch.gradients import (
    DTYPES,
    attach_gradients,
    gradient_dtype,
    gradient_of,
    padded_size,
)
from solollm_torch.kernels import OFF as KERNELS_OFF
from solollm_torch.kernels import Kernels
from solollm_torch.kernels import choose as choose_kernels
from solollm_torch.loss import Targets, token_nll
from solollm_torch.masters import WEIGHT_DTYPES, master_option, masters_of
from solollm_torch.model import Block, Decoder
from solollm_torch.narrowed import NarrowedWeights, narrow_blocks
from solollm_torch.ops import linear
from solollm_torch.optim import Optimizer
from solollm_torch.preference import Preference
from solollm_torch.process import memory_stats, set_up_process
from solollm_torch.state import TorchSnapshot, load_parameters, load_states
from solollm_torch.state_specs import zero_states
from solollm_torch.switches import SWITCHES, Switches
from solollm_torch.units import (
    LaggedStep,
    clip_factor,
    gradient_norms,
    total_norm,
    unit_optimizers,
    unit_parameters,
)


class _Step(PendingMetrics):
    """A step whose update is not applied yet."""

    def __init__(self, session: TorchSession, numbers: Tensor, tokens: int, lr: float) -> None:
        self.session, self.numbers, self.tokens, self.lr = session, numbers, tokens, lr
        self.metrics: StepMetrics | None = None

    def result(self) -> StepMetrics:
        self.session.settle()
        assert self.metrics is not None, "a step is settled before the next one starts"
        return self.metrics


class TorchSession(TrainSession):
    """See `solollm.backend.TrainSession`.

    `options.backend_options`: `compile` (auto, true, false; see `compiling`), `deterministic`
    (CUDA: bitwise repeatable kernels), `threads` (CPU threads; default: PyTorch's own number),
    `master` (float32, split, bfloat16; see `masters`), `gradients` (auto, float32, bfloat16),
    `kernels` (CPU: auto, true, false; see `kernels`), and the `switches`.
    """

    option_names: ClassVar[tuple[str, ...]] = (
        "compile", "deterministic", "gradients", "kernels", "master", "offload", "threads",
        *SWITCHES,
    )  # fmt: skip

    def __init__(
        self, model: ModelConfig, options: SessionOptions, plan: Plan, device: torch.device
    ) -> None:
        """A session with the core's initial weights of `options.seed`.

        Raises:
            BackendError: a compute dtype that is not implemented.
            ConfigError: an unknown or unusable entry of `backend_options`.
        """
        _refuse_unsupported(plan)
        given = options.backend_options
        set_up_process(given, device, self.option_names)
        self._model, self._plan, self._table = model, plan, options.optimizer
        self._preference = Preference.of(options)  # None: plain cross-entropy
        self._rows_at_once = rows_at_once(options.objective, plan.micro_batch_size)
        self._device = device
        self._settings: dict[str, bool | int | float | str] = {"threads": torch.get_num_threads()}
        if device.type == "cuda":
            self._settings["deterministic"] = bool(given.get("deterministic", False))
        self._updates, self._lagged_norm = 0, 0.0
        self._narrowed = NarrowedWeights()
        self._under_way: _Step | None = None
        self._switches = self._switch((), given, compiled=False)
        self._set_up(options)
        how = self._switches
        for optimizer in self._all_optimizers():
            optimizer.products, optimizer.compiles = how.newton_schulz, how.compiled_updates

    def _all_optimizers(self) -> Iterable[Optimizer]:
        return self._optimizers

    def _set_up(self, options: SessionOptions) -> None:
        """Make weights, gradients and optimizer."""
        given, model, device = options.backend_options, self._model, self._device
        master, compute = master_option(given, "float32"), DTYPES[self._plan.compute_dtype]
        self._decoder = Decoder(
            model, device=device, dtype=WEIGHT_DTYPES[master], compute_dtype=compute
        )
        self._masters = masters_of(self._decoder, split=master == "split")
        if device.type != "meta":  # which holds shapes alone: the planner's bytes are counted there
            for name, weight in self._initial_weights(options.seed):
                self._masters.write(name, weight)
        compiled = should_compile(given.get("compile", "auto"), device)
        self._switches = self._switch(self._decoder.layers, given, compiled=compiled)
        self._decoder.checkpointing = self._switches.recomputes_blocks
        dtype = gradient_dtype(given, master, compute)
        names = {value: key for key, value in DTYPES.items()}
        self._settings |= {"compile": compiled, "master": master, "gradients": names[dtype]}
        self._use_kernels(given)
        parameters = list(self._decoder.parameters())
        self._flat_gradient = torch.zeros(padded_size(parameters), dtype=dtype, device=device)
        attach_gradients(parameters, self._flat_gradient)
        self._gradients = self._decoder.canonical_views(gradient_of)
        self._unit_gradients = [
            [gradient_of(p) for p in unit] for unit in unit_parameters(self._decoder)
        ]
        specs, table = parameter_table(model), options.optimizer
        self._states = zero_states(specs, table, {spec.name: device for spec in specs})
        if master == "float32" and table.clip == "exact":  # Muon is faster over all layers at once
            whole = Optimizer(
                self._masters.weights, model=model, table=table, states=self._states,
                seed=options.seed,
            )  # fmt: skip
            self._optimizers = [whole]
        else:
            self._optimizers = unit_optimizers(
                model, table, self._masters, states=self._states, seed=options.seed
            )
        if compiled and not self._switches.recomputes_blocks:  # which keep no copies either
            self._narrowed = narrow_blocks(self._decoder)

    def _use_kernels(self, given: Mapping[str, bool | int | float | str]) -> None:
        """Use the compiled loops where they fit, and note which. They compute in float32 only."""
        if self._device.type != "cpu":
            return
        fits = self._decoder.compute_dtype == torch.float32 and not self._settings["compile"]
        kernels = choose_kernels(given.get("kernels", "auto")) if fits else None
        self._decoder.use(kernels)
        self._settings["kernels"] = KERNELS_OFF if kernels is None else kernels.digest

    def _initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """The core's, one at a time."""
        return ((n, torch.from_numpy(a)) for n, a in initial_parameters(self._model, seed))

    def _switch(
        self, blocks: Iterable[Block], given: Mapping[str, Any], *, compiled: bool
    ) -> Switches:
        """Read the switches and set them on the blocks; compile those."""
        switches = Switches.of(
            given, self._model, self._device, compiled=compiled,
            compute=DTYPES[self._plan.compute_dtype], plan=self._plan.activation_checkpointing,
        )  # fmt: skip
        blocks = list(blocks)
        for block in blocks:
            block.recompute = switches.recompute
            block.product = fp8_linear if switches.fp8 else linear
        if compiled:
            compile_blocks(blocks, cuda_graphs=switches.cuda_graphs)
        self._settings |= {name: given[name] for name in SWITCHES if name in given}
        return switches

    @property
    def settings(self) -> Mapping[str, bool | int | float | str]:
        return dict(self._settings)

    def train_step(self, batch: Batch, *, lr: float) -> PendingMetrics:
        self.settle()
        lagged = None
        if self._table.clip == "lagged":
            lagged = LaggedStep(lr=lr, updates=self._updates, grad_scale=self._lagged_factor())
        numbers = self._loss_and_norm(batch, lagged)
        self._under_way = _Step(self, numbers, batch.num_targets, lr)
        return self._under_way

    def settle(self) -> None:
        """Finish the step under way: wait for it, then apply its update or skip it whole."""
        step, self._under_way = self._under_way, None
        if step is None:
            return
        loss, norm, num_applied = step.numbers.tolist()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        partial = skipped and num_applied > 0
        step.metrics = StepMetrics(loss, norm, step.tokens, skipped, partial)
        if self._table.clip == "exact" and not skipped:
            self._apply(step.lr, clip_factor(self._table.clip_norm, step.numbers[1], norm))
        self._narrowed.refresh()
        if not skipped:
            self._updates += 1
            self._lagged_norm = norm

    def _apply(self, lr: float, grad_scale: Tensor | None) -> None:
        """Update every weight by the gradients that are there."""
        for optimizer in self._optimizers:
            optimizer.step(self._gradients, lr=lr, updates=self._updates, grad_scale=grad_scale)

    def _lagged_factor(self) -> Tensor | None:
        """The clip factor by the norm of the step before."""
        norm = torch.tensor(self._lagged_norm, device=self._device)
        return clip_factor(self._table.clip_norm, norm, self._lagged_norm)

    def probe_step(self, batch: Batch) -> StepMetrics:
        self.settle()
        loss, norm, _ = self._loss_and_norm(batch).tolist()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        return StepMetrics(loss, norm, batch.num_targets, skipped)

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """The batch's gradients by canonical name, unclipped, copied: for parity tests."""
        self.settle()
        self._loss_and_norm(batch)
        return {name: gradient.clone() for name, gradient in self._gradients.items()}

    def _loss_and_norm(self, batch: Batch, lagged: LaggedStep | None = None) -> Tensor:
        """Fill the gradients, and make the updates of a lagged step.

        Returns:
            [loss, gradient norm, units updated], fp32 on the device; nothing is waited for.
        """
        self._flat_gradient.zero_()
        loss = torch.zeros((), device=self._device)
        *before, last = self._micro_batches(batch)
        for rows in before:
            loss += self._backward(batch, rows)
        if lagged is None:
            loss += self._backward(batch, last)
            norm = total_norm([gradient_norms(unit) for unit in self._unit_gradients])
            return torch.stack((loss, norm, torch.zeros_like(loss)))
        norms: list[list[Tensor]] = []
        self._decoder.on_block_gradients = lambda index: self._update_block(index, lagged, norms)
        loss += self._backward(batch, last, lambda part: lagged.begin(loss + part))
        self._decoder.on_block_gradients = None
        self._update_unit(lagged, norms)
        return torch.stack((loss, total_norm(norms), lagged.num_applied()))

    def _backward(
        self, batch: Batch, rows: slice, begin: Callable[[Tensor], None] = lambda _: None
    ) -> Tensor:
        """Add the gradients of some rows; gives their share of the loss, and tells it to `begin`
        between forward and backward pass."""
        input_ids, segments, targets = self._upload(batch, rows)
        hidden = self._decoder(input_ids, segments)  # [M, T, C]
        head = self._decoder.head_weight
        loss, gradient = self._head_loss(
            hidden, head, targets, batch=batch, rows=rows, kernels=self._decoder.kernels
        )
        begin(loss)
        torch.autograd.backward(hidden, gradient)
        return loss

    def _head_loss(
        self, hidden: Tensor, head: Tensor, targets: Targets, *, batch: Batch, rows: slice,
        kernels: Kernels | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loss of some rows and its gradient by `hidden`; the head's is added to its own."""
        if self._preference is None:
            return self._switches.loss(hidden, head, targets, batch.denominator, kernels=kernels)
        return self._preference.loss_and_gradient(
            hidden, head, targets, batch=batch, rows=rows, kernels=kernels
        )

    def _update_block(self, index: int, lagged: LaggedStep, norms: list[list[Tensor]]) -> None:
        if index == self._model.num_hidden_layers - 1:  # what stands above the blocks is complete
            self._update_unit(lagged, norms)
        self._update_unit(lagged, norms)

    def _update_unit(self, lagged: LaggedStep, norms: list[list[Tensor]]) -> None:
        """Update the next unit, in backward order; `norms` has those of the units before it."""
        unit = len(norms)
        norms.append(gradient_norms(self._unit_gradients[unit]))
        lagged.update(self._optimizers[unit], self._gradients, norms[unit])

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        logprobs = self.token_logprobs(batch)
        return float(-logprobs.sum(dtype=np.float64)), batch.num_targets

    def token_logprobs(self, batch: Batch, *, adapter: bool = True) -> np.ndarray:
        self.settle()
        logprobs = np.zeros(batch.labels.shape, np.float32)
        for rows in self._micro_batches(batch):
            input_ids, segments, targets = self._upload(batch, rows)
            with torch.no_grad():
                hidden = self._decoder(input_ids, segments)
            nll = token_nll(hidden, self._decoder.head_weight, targets).cpu().numpy()
            flat = logprobs[rows].reshape(-1)  # a view: rows are contiguous
            flat[slice(None) if targets.rows is None else targets.rows.cpu().numpy()] = -nll
        return logprobs

    def _micro_batches(self, batch: Batch) -> Iterator[slice]:
        size, count = self._rows_at_once, len(batch.input_ids)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def _upload(self, batch: Batch, rows: slice) -> tuple[Tensor, Segments | None, Targets]:
        """Input ids int64 [M, T], segments and targets of some rows, on the device."""
        input_ids = torch.from_numpy(batch.input_ids[rows].astype(np.int64)).to(self._device)
        segments = None
        if batch.segment_ids is not None:
            way = self._switches.attention
            segments = Segments.of(batch.segment_ids[rows], self._device, way=way)
        weights = None if batch.token_weights is None else batch.token_weights[rows]
        return input_ids, segments, Targets.of(batch.labels[rows], weights, self._device)

    def engine(self, options: EngineOptions) -> Engine:
        from solollm_torch.engine import TorchEngine

        self.settle()
        with self._narrowed.wide_again():
            return TorchEngine(self._decoder, options)

    def snapshot(self) -> Snapshot:
        """Copies to the host, one tensor after the other: one pass over the state's memory."""
        self.settle()
        masters = self._masters
        return TorchSnapshot(
            {name: _copy_to_host(masters.read(name)) for name, _, _ in masters.specs()},
            {name: _copy_to_host(state) for name, state in self._states.items()},
            self.session_state,
        )

    def import_parameters(self, source: TensorSource) -> None:
        self.settle()
        load_parameters(self._masters, source)
        self._narrowed.refresh()

    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        self.settle()
        load_states(self._states, source, self._table)
        self._updates = int(state.get("updates", 0))
        self._lagged_norm = float(state.get("lagged_norm", 0.0))

    @property
    def session_state(self) -> Mapping[str, int | float]:
        self.settle()
        return {"updates": self._updates, "lagged_norm": self._lagged_norm}

    def memory(self) -> MemoryStats:
        return memory_stats(self._device)

    def copies(self) -> Copies | None:
        return Copies(0, 0)  # everything lies on the device

    def close(self) -> None:
        self.settle()
        del self._decoder, self._masters, self._states, self._optimizers
        del self._gradients, self._unit_gradients, self._flat_gradient, self._narrowed
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _refuse_unsupported(plan: Plan) -> None:
    if plan.compute_dtype not in DTYPES:
        raise BackendError(
            f"the torch backend does not train in {plan.compute_dtype}",
            why="float16 needs a loss scaler, and every supported card computes in bfloat16",
            fix="set train.compute_dtype to bfloat16 or float32",
        )


def _copy_to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
