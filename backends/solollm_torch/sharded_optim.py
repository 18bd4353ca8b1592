"""The optimizer where each rank holds some rows of every tensor.

AdamW works on its rows as on a whole tensor, and stochastic rounding draws for each element the
bits that it would draw in the whole. Muon needs whole matrices: of every N matrices each of N ranks
puts one together from everybody's rows, orthogonalises it, and sends the rows back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import DType
from solollm.config import OptimizerTable
from solollm_torch.masters import Masters
from solollm_torch.optim import Optimizer, Update, orthogonalize
from solollm_torch.ranks import lost_ranks_named
from solollm_torch.sharding import Part
from solollm_torch.state import TORCH_DTYPES
from solollm_torch.state_specs import set_to_zero, state_specs
from solollm_torch.units import LaggedStep, gradient_norms


class ShardedOptimizer(Optimizer):
    """`Optimizer` over this rank's rows. `step` is collective with Muon."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        masters: Masters,
        parts: Mapping[str, Part],
        model: ModelConfig,
        table: OptimizerTable,
        states: Mapping[str, Tensor],
        seed: int,
        device: torch.device,
    ) -> None:
        """`names`: the canonical tensors it updates; `device`: where matrices are multiplied."""
        self._parts, self._device = parts, device
        # A rank without rows of a tensor has nothing to do for it, but takes part in Muon.
        muon = {s.name for s in parameter_table(model) if s.group == "matrix"}
        muon = muon if table.name == "muon" else set()
        held = [n for n in names if n in muon or masters.weights[n].numel()]
        super().__init__(
            {name: masters.weights[name] for name in held},
            model=model,
            table=table,
            residuals=masters.residuals,
            states=states,
            seed=seed,
            first_elements={name: parts[name].first_element for name in held},
        )

    @property
    def is_collective(self) -> bool:
        """Whether a step talks to other ranks."""
        return bool(self._muon) and dist.get_world_size() > 1

    def _batches(self, names: Sequence[str]) -> list[list[str]]:
        size = len(self._parts[names[0]].rows)  # one matrix for each rank
        return [list(names[start : start + size]) for start in range(0, len(names), size)]

    def _orthogonal_step(
        self, names: list[str], gradients: Mapping[str, Tensor], update: Update
    ) -> None:
        means = []
        for name in names:
            gradient = gradients[name].to(torch.float32, copy=True)
            if update.grad_scale is not None:
                gradient.mul_(update.grad_scale)
            self._accumulate(name, gradient, update)
            means.append(gradient.to(self._device))
        parts = [self._parts[name] for name in names]
        rate = -update.lr * 0.2 * math.sqrt(max(parts[0].shape))
        for name, rows in zip(names, orthogonal_rows(means, parts, self.products), strict=True):
            self._take_direction(name, rows.to(gradients[name].device), rate, update)


def orthogonal_rows(
    matrices: Sequence[Tensor], parts: Sequence[Part], products: torch.dtype
) -> list[Tensor]:
    """This rank's rows of each orthogonalised matrix, from its rows of each; at most as many
    matrices as ranks, all of one whole shape. Collective."""
    rank, ranks = parts[0].rank, range(len(parts[0].rows))
    if len(ranks) == 1:
        return [orthogonalize(matrices[0].unsqueeze(0), products)[0]]
    to_owner = [m.numel() for m in matrices] + [0] * (len(ranks) - len(matrices))
    own = parts[rank] if rank < len(parts) else None
    columns = parts[0].shape[1]
    from_all = [(own.rows[r][1] - own.rows[r][0]) * columns if own else 0 for r in ranks]
    whole = matrices[0].new_empty(sum(from_all))
    with lost_ranks_named():
        sent = torch.cat([m.reshape(-1) for m in matrices])
        dist.all_to_all_single(whole, sent, from_all, to_owner)
        if own:  # rows of all ranks, in the order of the ranks, are the matrix
            whole = orthogonalize(whole.view(1, *own.shape), products).view(-1)
        dist.all_to_all_single(sent, whole, to_owner, from_all)
    rows = torch.split(sent, to_owner[: len(matrices)])
    return [r.view_as(m) for r, m in zip(rows, matrices, strict=True)]


def norm_over_ranks(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all ranks' rows of some gradients, fp32 0-dim. Collective."""
    gradients = list(gradients)
    norms = gradient_norms([g for g in gradients if g.numel()])
    if dist.get_world_size() == 1:
        alone: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return alone
    squares = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    if norms:
        squares = torch.stack(norms).double().square().sum()
    dist.all_reduce(squares)
    return squares.sqrt().float()


class HookedUpdates:
    """A lagged step (`units`) made in FSDP2's gradient hooks: a unit is updated when it has
    reduced the last of its gradients, which are given up at once.

    With the state on the host that happens on a thread of its own, while the backward pass goes on
    below; except where an update has to talk to other ranks, since exchanges keep one order. On a
    card it is queued where FSDP2 queued the gradients.
    """

    def __init__(
        self,
        units: Sequence[Sequence[str]],
        stored: Mapping[str, nn.Parameter],
        optimizers: Sequence[ShardedOptimizer],
        *,
        take_gradients: Callable[[Sequence[str]], dict[str, Tensor]],
    ) -> None:
        """`units` of canonical names; `stored`: the parameter that each is a part of."""
        self._units, self._optimizers, self._take = units, optimizers, take_gradients
        self._alone = dist.get_world_size() == 1
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="solollm-update")
        self._parameters = [{id(stored[n]): stored[n] for n in names} for names in units]
        for unit, parameters in enumerate(self._parameters):
            for parameter in parameters.values():
                hook = partial(self._on_gradient, unit)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._step: LaggedStep | None = None
        self._missing: list[set[int]] = []
        self._norms: list[Tensor] = []
        self._under_way: list[Future[None]] = []

    @contextmanager
    def applying(self, step: LaggedStep) -> Iterator[None]:
        """Around the last backward pass of a step; all updates are done when it is left."""
        self._step, self._norms, self._under_way = step, [], []
        self._missing = [set(parameters) for parameters in self._parameters]
        try:
            yield
        finally:
            self._step = None
            wait(self._under_way)
        for future in self._under_way:
            future.result()

    def total_norm(self) -> Tensor:
        """Of all gradients of the step, fp32 0-dim."""
        norm: Tensor = torch.linalg.vector_norm(torch.stack(self._norms))
        return norm

    def close(self) -> None:
        self._worker.shutdown()

    def _on_gradient(self, unit: int, parameter: Tensor) -> None:
        if self._step is None:
            return
        missing = self._missing[unit]
        missing.discard(id(parameter))
        if missing:
            return
        gradients = self._take(self._units[unit])
        norm = None if self._alone else norm_over_ranks(gradients.values())
        update = partial(self._update, unit, gradients, norm, step=self._step)
        on_host = all(gradient.device.type == "cpu" for gradient in gradients.values())
        if on_host and not self._optimizers[unit].is_collective:
            self._under_way.append(self._worker.submit(update))
        else:
            update()

    def _update(
        self, unit: int, gradients: dict[str, Tensor], norm: Tensor | None, *, step: LaggedStep
    ) -> None:
        norm = norm_over_ranks(gradients.values()) if norm is None else norm
        self._norms.append(norm)
        step.update(self._optimizers[unit], gradients, [norm])


def zero_rows(
    parts: Mapping[str, Part], model: ModelConfig, table: OptimizerTable, device: torch.device
) -> dict[str, Tensor]:
    """This rank's rows of every optimizer state, by its name on disk."""
    states = {}
    for name, dtype, shape in state_specs(parameter_table(model), table):
        own_shape = part_of_state(name, shape, parts).own_shape
        states[name] = torch.empty(own_shape, dtype=TORCH_DTYPES[dtype], device=device)
        set_to_zero(name, states[name])
    return states


def part_of_state(name: str, shape: tuple[int, ...], parts: Mapping[str, Part]) -> Part:
    """Who holds which rows of an optimizer state: as of its parameter."""
    parameter = name.partition(".")[2]
    if parameter.endswith(".absmax"):  # 8-bit states are never shared out
        return Part(shape, ((0, shape[0]),), 0, 0)
    return parts[parameter]


def state_parts(
    parts: Mapping[str, Part], model: ModelConfig, table: OptimizerTable
) -> Iterator[tuple[str, DType, Part]]:
    """Name, dtype and part of every state, in the order of a file."""
    for name, dtype, shape in state_specs(parameter_table(model), table):
        yield name, dtype, part_of_state(name, shape, parts)
