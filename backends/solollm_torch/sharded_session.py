"""Training with FSDP2: several cards or nodes under torchrun, or one whose model lives on the host.

`TorchSession` with another memory: the decoder is spread over ranks (`sharding`), each rank takes
its slice of the batch's rows, and updates (`sharded_optim`), saves and loads (`sharded_state`) its
rows of every tensor. One process without a launcher is a group of one.

FSDP2 gives each parameter a gradient of its own after a backward pass. With `clip = "lagged"` the
weights of a block are updated as soon as theirs are there, on a worker thread where that needs no
other rank, while the backward pass of the blocks below goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from solollm.architecture import initial_parameters
from solollm.backend import (
    IGNORED,
    Batch,
    Copies,
    Engine,
    EngineOptions,
    SessionOptions,
    Snapshot,
    TensorSource,
)
from solollm.errors import ConfigError
from solollm_torch.compiling import should_compile
from solollm_torch.gradients import DTYPES
from solollm_torch.loss import token_nll
from solollm_torch.masters import WEIGHT_DTYPES, Masters, master_option
from solollm_torch.model import Decoder
from solollm_torch.ranks import host_group, join, lost_ranks_named
from solollm_torch.session import TorchSession
from solollm_torch.sharded_optim import (
    HookedUpdates,
    ShardedOptimizer,
    norm_over_ranks,
    state_parts,
    zero_rows,
)
from solollm_torch.sharded_state import OwnRows, ShardedSnapshot, Streamed
from solollm_torch.sharding import (
    local,
    modules_of,
    parts_of,
    shard,
    spread,
    stored_parameters,
)
from solollm_torch.state import load_parameters, load_states
from solollm_torch.units import LaggedStep, UnitNames


class ShardedSession(TorchSession):
    """See `solollm.backend.TrainSession` and `TorchSession`.

    `backend_options` besides those: `offload` = fsdp keeps weights, gradients and optimizer states
    in host memory.
    """

    def _set_up(self, options: SessionOptions) -> None:
        given, model, device = options.backend_options, self._model, self._device
        join(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        _refuse_shared_codes(options, self.world_size)
        _refuse_other_offload(given, self.world_size)
        master = master_option(given, "float32")
        if given.get("gradients") == "float32" and master != "float32":
            warnings.warn("`gradients` has no effect with FSDP2: they are bfloat16", stacklevel=5)
        offload = given.get("offload", "none") == "fsdp"
        decoder = Decoder(
            model, device="meta", dtype=WEIGHT_DTYPES[master],
            compute_dtype=DTYPES[self._plan.compute_dtype],
        )  # fmt: skip
        compiled = should_compile(given.get("compile", "auto"), device)
        self._switches = self._switch(decoder.layers, given, compiled=compiled)
        decoder.checkpointing = self._switches.recomputes_blocks
        shard(decoder, device, offload=offload)
        self._settings |= {"compile": compiled, "master": master}
        if offload:
            self._settings["offload"] = "fsdp"
        self._decoder, self._host_group = decoder, host_group()
        self._parts = parts_of(decoder, self.rank, self.world_size)
        self._stored = stored_parameters(decoder)
        self._masters = self._own_masters(split=master == "split")
        for name, array in initial_parameters(model, options.seed):
            self._masters.write(name, torch.from_numpy(array[self._parts[name].own_rows]))
        place = torch.device("cpu") if offload else device
        self._states = zero_rows(self._parts, model, options.optimizer, place)
        self._gradients: dict[str, Tensor] = {}
        self._snapshots: list[ShardedSnapshot] = []
        self._set_up_updates(options)

    def _own_masters(self, *, split: bool) -> Masters:
        shards = {id(p): local(p.detach()) for p in self._stored.values()}
        residuals = {
            key: torch.zeros_like(rows, dtype=torch.int16) for key, rows in shards.items() if split
        }

        def views(of: dict[int, Tensor]) -> dict[str, Tensor]:
            return {n: p.of(of[id(self._stored[n])]) for n, p in self._parts.items()}

        return Masters(views(shards), views(residuals) if split else None)

    def _set_up_updates(self, options: SessionOptions) -> None:
        lagged = self._table.clip == "lagged"
        units = UnitNames.of(self._model).backward_order if lagged else [list(self._parts)]
        optimizers = [
            ShardedOptimizer(
                names, masters=self._masters, parts=self._parts, model=self._model,
                table=self._table, states=self._states, seed=options.seed, device=self._device,
            )
            for names in units
        ]  # fmt: skip
        self._optimizers = [*optimizers]
        self._hooked: HookedUpdates | None = None
        if lagged:
            self._hooked = HookedUpdates(
                units, self._stored, optimizers, take_gradients=self._take_gradients
            )

    def _take_gradients(self, names: Sequence[str]) -> dict[str, Tensor]:
        """This rank's rows of the gradients of some tensors, which FSDP2 no longer holds then."""
        shards: dict[int, Tensor] = {}
        for parameter in (self._stored[name] for name in names):
            if id(parameter) not in shards:
                assert parameter.grad is not None, "a backward pass fills every gradient"
                shards[id(parameter)] = local(parameter.grad)
                parameter.grad = None
        return {name: self._parts[name].of(shards[id(self._stored[name])]) for name in names}

    def _apply(self, lr: float, grad_scale: Tensor | None) -> None:
        self._preserve_snapshots()
        super()._apply(lr, grad_scale)
        self._gradients = {}

    def _loss_and_norm(self, batch: Batch, lagged: LaggedStep | None = None) -> Tensor:
        for parameter in self._stored.values():
            parameter.grad = None
        loss = torch.zeros((), device=self._device)
        *before, last = self._own_micro_batches(batch)
        with lost_ranks_named():
            for part, rows in before:
                loss += self._backward(part, rows)
            if lagged is not None:
                return self._lagged_backward(loss, last, lagged)
            loss += self._backward(*last)
            self._gradients = self._take_gradients(list(self._parts))
            norm = norm_over_ranks(self._gradients.values()).to(self._device)
            return torch.stack((self._summed(loss), norm, torch.zeros_like(norm)))

    def _lagged_backward(self, loss: Tensor, last: tuple[Batch, slice], step: LaggedStep) -> Tensor:
        """The backward pass that updates as it goes; gives what `_loss_and_norm` does."""
        assert self._hooked is not None, "hooks are set for lagged clipping"
        self._preserve_snapshots()
        whole: list[Tensor] = []

        def begin(part: Tensor) -> None:
            whole.append(self._summed(loss + part))
            step.begin(whole[0])

        with self._hooked.applying(step):
            self._backward(*last, begin)
        norm = self._hooked.total_norm().to(self._device)
        return torch.stack((whole[0], norm, step.num_applied().to(self._device)))

    def _backward(
        self, batch: Batch, rows: slice, begin: Callable[[Tensor], None] = lambda _: None
    ) -> Tensor:
        input_ids, segments, targets = self._upload(batch, rows)
        hidden = self._decoder(input_ids, segments)  # [M, T, C]
        weight = self._decoder.head_weight  # put together: the root keeps its weights till backward
        head = weight.detach().requires_grad_()
        head.grad_dtype = torch.float32
        head.grad = torch.zeros_like(weight, dtype=torch.float32)
        loss, gradient = self._head_loss(hidden, head, targets, batch=batch, rows=rows)
        begin(loss)
        weight.grad = head.grad.to(weight.dtype)  # FSDP2 reduces it with what autograd adds to it
        del head
        torch.autograd.backward(hidden, gradient)
        return loss

    def _summed(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def token_logprobs(self, batch: Batch, *, adapter: bool = True) -> np.ndarray:
        self.settle()
        logprobs = np.zeros(batch.labels.shape, np.float32)
        with lost_ranks_named(), torch.no_grad():
            for part, rows in self._own_micro_batches(batch):
                input_ids, segments, targets = self._upload(part, rows)
                hidden = self._decoder(input_ids, segments)
                nll = token_nll(hidden, self._decoder.head_weight, targets).cpu().numpy()
                flat = logprobs[rows].reshape(-1)  # a view: rows are contiguous
                flat[slice(None) if targets.rows is None else targets.rows.cpu().numpy()] = -nll
            # FSDP2 leaves the root put together for a backward pass that does not come.
            spread(self._decoder).reshard()
            if self.world_size > 1:
                dist.all_reduce(torch.from_numpy(logprobs))
        return logprobs

    def _own_micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, slice]]:
        """This rank's rows of the batch, in slices. As many on every rank, since FSDP2 puts blocks
        together on all at once: who has fewer takes part with rows without targets."""
        together = 1 if batch.pair_ids is None else 2  # rows of a pair stay on one rank
        count = len(batch.input_ids) // together
        ends = [together * (count * r // self.world_size) for r in range(self.world_size + 1)]
        size = self._rows_at_once
        rounds = max(-(-(b - a) // size) for a, b in pairwise(ends))
        first, last = ends[self.rank], ends[self.rank + 1]
        blank = replace(batch, labels=np.full_like(batch.labels, IGNORED))
        for start in range(first, first + rounds * size, size):
            if start < last:
                yield batch, slice(start, min(start + size, last))
            else:
                yield blank, slice(0, together)

    def copies(self) -> Copies | None:
        return None  # FSDP2 makes them, and counts none

    def engine(self, options: EngineOptions) -> Engine:
        """Over a copy of all weights, on every rank."""
        from solollm_torch.engine import TorchEngine

        self.settle()
        dtype = self._decoder.compute_dtype
        whole = Decoder(self._model, device=self._device, dtype=dtype)
        pairs = zip(modules_of(self._decoder), modules_of(whole), strict=True)
        with lost_ranks_named(), torch.no_grad():
            for module, target in pairs:
                spread(module).unshard()
                for name, parameter in module.named_parameters(recurse=False):
                    target.get_parameter(name).copy_(parameter)
                spread(module).reshard()
        return TorchEngine(whole, options, release=True)

    def snapshot(self) -> Snapshot:
        """Nothing is copied until it is read, or until training goes on before that."""
        self.settle()
        parameters = [
            Streamed(name, dtype, self._parts[name], self._masters.writer(name))
            for name, dtype, _ in self._masters.specs()
        ]
        states = [
            Streamed(name, dtype, part, partial(_copy_into, source=self._states[name]))
            for name, dtype, part in state_parts(self._parts, self._model, self._table)
        ]
        taken = ShardedSnapshot(parameters, states, self.session_state, self._host_group)
        self._snapshots.append(taken)
        return taken

    def _preserve_snapshots(self) -> None:
        """The weights are about to change."""
        open_ones, self._snapshots = self._snapshots, []
        for snapshot in open_ones:
            snapshot.preserve()

    def import_parameters(self, source: TensorSource) -> None:
        self.settle()
        self._preserve_snapshots()
        load_parameters(self._masters, OwnRows(source, self._parts))

    def import_optimizer(self, source: TensorSource, state: Mapping[str, int | float]) -> None:
        self.settle()
        self._preserve_snapshots()
        parts = {n: part for n, _, part in state_parts(self._parts, self._model, self._table)}
        load_states(self._states, OwnRows(source, parts), self._table)
        self._updates = int(state.get("updates", 0))
        self._lagged_norm = float(state.get("lagged_norm", 0.0))

    def close(self) -> None:
        self.settle()
        if self._hooked is not None:
            self._hooked.close()
        del self._decoder, self._stored, self._masters, self._states, self._optimizers
        del self._gradients, self._hooked, self._snapshots
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _copy_into(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _refuse_other_offload(given: Mapping[str, bool | int | float | str], world_size: int) -> None:
    offload = given.get("offload", "none")
    if offload not in ("none", "fsdp"):
        raise ConfigError(
            f"offload = {offload!r} does not go with {world_size} processes",
            why="weights that are shared out are held by FSDP2, on the cards or on the host",
            fix="use none or fsdp, or train in one process",
        )


def _refuse_shared_codes(options: SessionOptions, world_size: int) -> None:
    if world_size > 1 and options.optimizer.state_bits == 8:
        raise ConfigError(
            f"optimizer.state_bits = 8 does not go with {world_size} processes",
            why="a block of 8-bit codes shares one scale, and its rows may lie on two of them",
            fix="set optimizer.state_bits to 16 or 32, or train in one process",
        )
