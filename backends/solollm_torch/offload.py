"""Training with the model in host memory: weights stream through the device, block by block.

    host    every block's weights, residuals and states, pinned; embedding, norm and head likewise
    device  two slots for weights, two for updates; embedding, norm and head; all gradients; the
            block inputs of one micro-batch (or two of them); what one block needs to be computed

A step is that of `TorchSession`, bit for bit, in another order of copies: forward through the
blocks while the next is loaded, backward likewise with each block recomputed from its input, and
the updates on the device, where state comes, is changed and goes. With exact clipping the updates
follow the last backward pass; with lagged clipping block l is updated before block l-1 goes
backward, while that one's weights and the next one's state are on their way.

The copies are in `lanes`, the slots in `weight_ring`, `residuals` and `streamed_updates`, what is
where in `layout` and `host_state`, and how many bytes all that moves in `traffic`.

Shapes: M rows of a micro-batch, T positions, C hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from solollm.backend import (
    Batch,
    Copies,
    Engine,
    EngineOptions,
    SessionOptions,
    Snapshot,
    TensorSource,
)
from solollm.errors import BackendError, ConfigError
from solollm_torch.attention import Segments
from solollm_torch.compiling import should_compile
from solollm_torch.gradients import (
    DTYPES,
    attach_gradients,
    gradient_dtype,
    gradient_of,
    padded_size,
)
from solollm_torch.host_snapshot import HostSnapshot
from solollm_torch.host_state import HostState
from solollm_torch.kept_blocks import KeptBlocks
from solollm_torch.lanes import lanes_for
from solollm_torch.layout import block_over
from solollm_torch.masters import WEIGHT_DTYPES, master_option
from solollm_torch.model import Block, Decoder
from solollm_torch.ops import Rotary
from solollm_torch.optim import Optimizer
from solollm_torch.residuals import Residuals
from solollm_torch.session import TorchSession
from solollm_torch.streamed_decoder import StreamedDecoder
from solollm_torch.streamed_updates import StreamedUpdates
from solollm_torch.traffic import Traffic
from solollm_torch.units import LaggedStep, gradient_norms, total_norm
from solollm_torch.weight_ring import WeightRing


class StreamingSession(TorchSession):
    """See `solollm.backend.TrainSession`; an engine lies in the memory of the gradients, and is
    valid until the next `train_step` or `probe_step`.

    `options.backend_options` besides those of `TorchSession`: `slots` (blocks on the device at
    once, 2 or more), `offload_residuals` (block inputs go to the host too). `master` is split
    unless it is bfloat16.
    """

    option_names: ClassVar[tuple[str, ...]] = (
        *TorchSession.option_names, "slots", "offload_residuals",
    )  # fmt: skip

    def _set_up(self, options: SessionOptions) -> None:
        given, model, device = options.backend_options, self._model, self._device
        if options.adapter is not None:
            raise BackendError(
                "adapters are not trained with offload = streaming",
                why="their base is frozen and has no state to stream",
                fix="leave `offload` out; a quantised base takes little memory",
            )
        master, compute = master_option(given, "split"), DTYPES[self._plan.compute_dtype]
        if master == "float32":
            raise ConfigError(
                "offload = streaming does not hold weights in float32",
                why="twice the bytes would stream, for the same values as the exact split",
                fix="leave `master` out, or set it to split or bfloat16",
            )
        compiled = should_compile(given.get("compile", "auto"), device)
        dtype = gradient_dtype(given, master, compute)
        self._lanes = lanes = lanes_for(device)
        self._host = HostState(model, options.optimizer, master, lanes)
        self._host.begin(self._initial_weights(options.seed))
        self._masters, self._states = self._host.masters, self._host.states
        slots = _slots(given)
        self._ring = WeightRing(model, self._host, lanes, num_slots=slots, gradient_dtype=dtype)
        self._switches = self._switch(self._ring.blocks, given, compiled=compiled)
        recomputes = self._switches.recomputes_blocks
        offloads = _offloads_residuals(given, recomputes=recomputes)
        self._decoder = StreamedDecoder(
            model, self._ring, device=device, dtype=WEIGHT_DTYPES[master], compute_dtype=compute
        )
        self._make_gradients(dtype)
        self._streamed = StreamedUpdates(
            model, options.optimizer, self._host, self._ring,
            ends=self._decoder.masters(), seed=options.seed, lanes=lanes,
        )  # fmt: skip
        self._kept = KeptBlocks(
            Residuals(lanes, model.num_hidden_layers, offload=offloads),
            recomputes=recomputes,
        )
        self._snapshots: list[weakref.ref[HostSnapshot]] = []
        self._counted = self._moved = Traffic(0, 0)
        self._refresh_device()
        names = {value: key for key, value in DTYPES.items()}
        self._settings |= {
            "compile": compiled, "master": master, "gradients": names[dtype],
            "offload": "streaming", "slots": slots,
            "offload_residuals": offloads,
        }  # fmt: skip
        self._use_kernels(given)

    def _make_gradients(self, dtype: torch.dtype) -> None:
        """One vector on the device: the ends' first, then block after block."""
        ends, block = list(self._decoder.parameters()), self._ring.blocks[0]
        per_block = padded_size(list(block.parameters()))
        sizes = [padded_size(ends), *[per_block] * self._model.num_hidden_layers]
        self._flat_gradient = torch.zeros(sum(sizes), dtype=dtype, device=self._device)
        of_ends, *of_blocks = torch.split(self._flat_gradient, sizes)
        attach_gradients(ends, of_ends)
        self._gradients = self._decoder.canonical_views(gradient_of)
        self._block_gradients: list[dict[str, Tensor]] = []
        for index, part in enumerate(of_blocks):
            attach_gradients(list(block.parameters()), part)
            stored = {name: gradient_of(p) for name, p in block.named_parameters()}
            self._block_gradients.append(stored)
            views = block.canonical_views(gradient_of)
            prefix = f"model.layers.{index}."
            self._gradients |= {f"{prefix}{name}.weight": view for name, view in views.items()}

    def _all_optimizers(self) -> Iterable[Optimizer]:
        return self._streamed.optimizers

    def settle(self) -> None:
        was_under_way = self._under_way is not None
        super().settle()
        if was_under_way:
            loaded, stored = self._counted
            self._moved = Traffic(
                self._lanes.loaded_bytes - loaded, self._lanes.stored_bytes - stored
            )

    @property
    def traffic(self) -> Traffic:
        """Bytes that the last train step has moved."""
        self.settle()
        return self._moved

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the residual stream is held in."""
        return self._decoder.compute_dtype

    def copies(self) -> Copies:
        moved, seconds = self.traffic, self.lane_seconds()
        return Copies(
            moved.loaded, moved.stored,
            seconds.get("load"), seconds.get("store"), seconds.get("stalled"),
        )  # fmt: skip

    def lane_seconds(self) -> Mapping[str, float]:
        """Of the last train step: see `Lanes.seconds`."""
        self.settle()
        return self._lanes.seconds()

    def pinned_residual_bytes(self) -> int:
        """Of the host's buffers for block inputs."""
        return self._kept.host_bytes()

    def _refresh_device(self) -> None:
        """Take over what has been written to the host's memory."""
        self._ring.forget()
        for name, weight in self._decoder.masters().items():
            self._lanes.wait(self._lanes.load(weight, self._host.masters.weights[name]))

    def _loss_and_norm(self, batch: Batch, lagged: LaggedStep | None = None) -> Tensor:
        self._flat_gradient.zero_()
        loss = torch.zeros((), device=self._device)
        for index in range(self._ring.num_slots):
            self._ring.prefetch(index)
        self._counted = Traffic(self._lanes.loaded_bytes, self._lanes.stored_bytes)
        self._lanes.restart_clocks()
        *before, last = self._micro_batches(batch)
        for rows in before:
            loss += self._pass(batch, rows)
        norms: list[list[Tensor]] = []
        if lagged is None:
            loss += self._pass(batch, last)
            norms = [self._norms(unit) for unit in range(self._streamed.num_units)]
            return torch.stack((loss, total_norm(norms), torch.zeros_like(loss)))
        self._streamed.begin()

        def begin(part: Tensor) -> None:
            self._before_update()
            lagged.begin(loss + part)
            self._update_unit(lagged, norms)

        loss += self._pass(batch, last, begin, lambda _: self._update_unit(lagged, norms))
        self._update_unit(lagged, norms)
        return torch.stack((loss, total_norm(norms), lagged.num_applied()))

    def _pass(
        self,
        batch: Batch,
        rows: slice,
        between: Callable[[Tensor], None] = lambda _: None,
        after_block: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """Add the gradients of some rows; gives their share of the loss.

        `between` gets it between forward and backward, when what stands above the blocks has its
        gradients; `after_block` is told each block whose gradients are complete, in that order.
        """
        input_ids, segments, targets = self._upload(batch, rows)
        ends, ring, kept = self._decoder, self._ring, self._kept
        rotary = ends.rotary(input_ids.shape[1])
        embedded = ends.embed(input_ids)  # [M, T, C]
        x, blocks = embedded.detach(), range(self._model.num_hidden_layers)
        for index in blocks:
            block = ring.use(index)
            ring.prefetch(index + 1)
            x = kept.forward(index, x, partial(_compute, block, rotary, segments))
            ring.release(index)
        x.requires_grad_()
        hidden = ends.final_norm(x)
        head = ends.head_weight
        loss, gradient = self._head_loss(
            hidden, head, targets, batch=batch, rows=rows, kernels=ends.kernels
        )
        torch.autograd.backward(hidden, gradient)
        between(loss)
        assert x.grad is not None, "the hidden states depend on the last block's output"
        gradient = x.grad
        for index in reversed(blocks):
            block = ring.use(index)
            ring.prefetch(index - 1)
            self._attach(block, index)
            gradient = kept.backward(index, gradient, partial(_compute, block, rotary, segments))
            after_block(index)
            ring.release(index)
        torch.autograd.backward(embedded, gradient)
        return loss

    def _attach(self, block: Block, index: int) -> None:
        for name, parameter in block.named_parameters():
            parameter.grad = self._block_gradients[index][name]

    def _update_unit(self, lagged: LaggedStep, norms: list[list[Tensor]]) -> None:
        """Update the next unit, in backward order; `norms` has those of the units before it."""
        unit = len(norms)
        norms.append(self._norms(unit))

        def apply(optimizer: Optimizer, gradients: Mapping[str, Tensor]) -> None:
            lagged.update(optimizer, gradients, norms[unit])

        self._streamed.run(unit, self._gradients, apply)

    def _norms(self, unit: int) -> list[Tensor]:
        """Of the gradients of a unit, in the order of its parameters."""
        ends, last = self._decoder, self._model.num_hidden_layers
        if 0 < unit <= last:
            return gradient_norms(list(self._block_gradients[last - unit].values()))
        head = [] if ends.lm_head is None else [ends.lm_head]
        parameters: list[nn.Parameter] = [ends.norm, *head] if unit == 0 else [ends.embed_tokens]
        return gradient_norms([gradient_of(p) for p in parameters])

    def _apply(self, lr: float, grad_scale: Tensor | None) -> None:
        self._before_update()
        updates = self._updates

        def apply(optimizer: Optimizer, gradients: Mapping[str, Tensor]) -> None:
            optimizer.step(gradients, lr=lr, updates=updates, grad_scale=grad_scale)

        self._streamed.begin()
        for unit in range(self._streamed.num_units):
            self._streamed.run(unit, self._gradients, apply)

    def _before_update(self) -> None:
        """The host's memory is about to change: whoever reads it must be done, or keep a copy."""
        for reference in self._snapshots:
            snapshot = reference()
            if snapshot is not None and snapshot.is_shared:
                self._lanes.synchronize()
                snapshot.before_change()
        self._snapshots = [r for r in self._snapshots if (s := r()) is not None and s.is_shared]

    def engine(self, options: EngineOptions) -> Engine:
        from solollm_torch.engine import TorchEngine

        self.settle()
        return TorchEngine(self._resident_decoder(), options)

    def _resident_decoder(self) -> Decoder:
        """All weights on the device, in the memory of the gradients: there are as many of those,
        and they mean nothing between two steps."""
        decoder = Decoder(
            self._model, device="meta", dtype=self._decoder.embed_tokens.dtype,
            compute_dtype=self._decoder.compute_dtype,
        )  # fmt: skip
        decoder.embed_tokens, decoder.norm = self._decoder.embed_tokens, self._decoder.norm
        decoder.lm_head = self._decoder.lm_head
        room = self._flat_gradient.view(torch.uint8)
        section, size = self._host.layout.weights, self._host.layout.weight_bytes
        for index, weights in enumerate(self._host.block_weights):
            target, room = room[:size], room[size:]
            self._lanes.wait(self._lanes.load(target, weights))
            decoder.layers[index] = block_over(self._model, section.views(target))
        return decoder

    def snapshot(self) -> Snapshot:
        """Reads the live host memory while it is streamed; see `host_snapshot`."""
        self.settle()
        self._lanes.synchronize()
        snapshot = HostSnapshot(self._host.masters, self._host.states, self.session_state)
        self._snapshots.append(weakref.ref(snapshot))
        return snapshot

    def import_parameters(self, source: TensorSource) -> None:
        self._begin_import()
        super().import_parameters(source)
        self._refresh_device()

    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        self._begin_import()
        super().import_optimizer(source, state)

    def _begin_import(self) -> None:
        self.settle()
        self._before_update()
        self._lanes.synchronize()

    def close(self) -> None:
        self.settle()
        self._before_update()
        del self._decoder, self._ring, self._kept, self._streamed
        del self._gradients, self._block_gradients, self._flat_gradient
        del self._masters, self._states, self._host
        self._lanes.close()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _compute(block: Block, rotary: Rotary, segments: Segments | None, x: Tensor) -> Tensor:
    y: Tensor = block(x, rotary, segments)
    return y


def _slots(given: Mapping[str, bool | int | float | str]) -> int:
    slots = int(given.get("slots", 2))
    if slots < 2:
        raise ConfigError(
            f"slots = {slots} leaves no room for the next block",
            why="while one is computed with, another is loaded",
            fix="set slots to 2 or more",
        )
    return slots


def _offloads_residuals(given: Mapping[str, bool | int | float | str], *, recomputes: bool) -> bool:
    offloads = bool(given.get("offload_residuals", False))
    if offloads and not recomputes:
        raise ConfigError(
            "offload_residuals has nothing to take off the device",
            why="blocks that are not recomputed keep all of their activations there",
            fix="set train.activation_checkpointing to true",
        )
    return offloads
