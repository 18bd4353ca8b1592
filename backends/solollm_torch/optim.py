"""AdamW and Muon over canonical tensors, with fp32 or 8-bit states.

The canonical Hugging Face tensor is the unit, whatever the decoder's own storage is: parameters
and gradients arrive as views of it by name. States are named as they lie on disk. 8-bit
states are decoded, updated and encoded again by `codec`, a chunk at a time.

Shapes: N matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from solollm.architecture import ModelConfig, ParameterSpec, parameter_table
from solollm.backend import DType, TensorSource
from solollm.config import OptimizerTable
from solollm.errors import IntegrityError
from solollm.optim_codec import State, codebook, is_quantized, num_blocks
from solollm_torch.codec import CodedState
from solollm_torch.state import TAGS, from_host

CHUNK_ELEMENTS = 1 << 19  # of a decoded 8-bit state: whole blocks, and it fits the cache
MUON_BATCH_ELEMENTS = 1 << 22  # matrices orthogonalised at once: bounds the scratch memory
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024, https://kellerjordan.github.io/posts/muon
NEWTON_SCHULZ_STEPS = 5


class _Update(NamedTuple):
    """What every tensor's update shares; see `Optimizer.step`."""

    lr: float
    updates: int
    grad_scale: Tensor | None


class Optimizer:
    """The states of one model and the update of its weights.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for every tensor, or Muon (Jordan 2024) for
    the block matrices and AdamW for the rest. Weight decay is decoupled and only where the name
    table says so. A Muon update is scaled by 0.2 sqrt(max(R, C)), so that its root mean square is
    that of AdamW and one lr serves both (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], *, model: ModelConfig, table: OptimizerTable
    ) -> None:
        """`parameters`: canonical name -> contiguous fp32 master (or a view), updated in place."""
        self._parameters = dict(parameters)
        self._table = table
        self._states: dict[str, Tensor] = {}
        self._fused: dict[bool, list[str]] = {True: [], False: []}  # by decay
        self._coded: list[ParameterSpec] = []
        matrices: dict[tuple[int, ...], list[str]] = {}
        for spec in parameter_table(model):
            coded = table.state_bits == 8 and is_quantized(spec.shape, spec.group)
            if table.name == "muon" and spec.group == "matrix":
                matrices.setdefault(spec.shape, []).append(spec.name)
                self._allocate("momentum_buffer", spec, coded=coded)
                continue
            self._allocate("exp_avg", spec, coded=coded)
            self._allocate("exp_avg_sq", spec, coded=coded)
            if coded:
                self._coded.append(spec)
            else:
                self._fused[spec.decay].append(spec.name)
        self._muon = [batch for names in matrices.values() for batch in self._batches(names)]

    @torch.no_grad()
    def step(
        self,
        gradients: Mapping[str, Tensor],
        *,
        lr: float,
        updates: int,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Apply one update in place.

        `gradients`: fp32, by canonical name; each is used as gradient * grad_scale (0-dim fp32, the
        clip factor) and holds no promised value afterwards. `updates`: how many were applied
        before this one.
        """
        update = _Update(lr, updates, grad_scale)
        for decay, names in self._fused.items():
            parameters = [self._parameters[name] for name in names]
            exp_avg = [self._states[f"exp_avg.{name}"] for name in names]
            exp_avg_sq = [self._states[f"exp_avg_sq.{name}"] for name in names]
            tensors = (parameters, [gradients[name] for name in names], exp_avg, exp_avg_sq)
            self._adamw(tensors, update, decay=decay)
        for spec in self._coded:
            self._coded_adamw(spec, gradients[spec.name], update)
        for names in self._muon:
            self._orthogonal_step(names, gradients, update)

    def specs(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        """Name, dtype and shape of every state, in table order."""
        return [(name, TAGS[t.dtype], tuple(t.shape)) for name, t in self._states.items()]

    def export(self, state_name: str) -> Tensor:
        """The state itself, not a copy: valid until the next `step`."""
        return self._states[state_name]

    def load(self, source: TensorSource) -> None:
        """Take every state from `source`.

        Raises:
            IntegrityError: names what is missing, unexpected, or of another dtype or shape.
                Nothing is taken when names differ; after a wrong shape the states are a mixture.
        """
        names = set(source.names())
        problems = [f"missing {name}" for name in self._states if name not in names]
        problems += [f"unexpected {name}" for name in sorted(names - self._states.keys())]
        if not problems:
            problems = list(self._read_all(source))
        if problems:
            shown = ", ".join(problems[:8]) + (", ..." if len(problems) > 8 else "")
            raise IntegrityError(
                f"the optimizer state does not fit: {len(problems)} tensors: {shown}",
                why=f"this session trains with {self._table.name}, {self._table.state_bits}-bit",
                fix="resume with the optimizer settings that the checkpoint was written with",
            )

    def _read_all(self, source: TensorSource) -> Iterator[str]:
        for name, tag, shape in self.specs():
            tensor = source.read(name)
            if (tensor.dtype, tuple(tensor.shape)) != (tag, shape):
                found = f"{tensor.dtype} {list(tensor.shape)}"
                yield f"misshapen {name}: {found} instead of {tag} {list(shape)}"
            else:
                self._states[name].copy_(from_host(tensor))

    def _allocate(self, state: State, spec: ParameterSpec, *, coded: bool) -> None:
        device = self._parameters[spec.name].device
        name = f"{state}.{spec.name}"
        if not coded:
            self._states[name] = torch.zeros(spec.shape, device=device)
            return
        zero = int(codebook(state).borders.searchsorted(0.0))
        self._states[name] = torch.full(spec.shape, zero, dtype=torch.uint8, device=device)
        self._states[f"{name}.absmax"] = torch.zeros(num_blocks(spec.shape), device=device)

    def _batches(self, names: Sequence[str]) -> list[list[str]]:
        size = max(1, MUON_BATCH_ELEMENTS // self._parameters[names[0]].numel())
        return [list(names[start : start + size]) for start in range(0, len(names), size)]

    def _adamw(
        self,
        tensors: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]],
        update: _Update,
        *,
        decay: bool,
    ) -> None:
        """The fused kernel: on CPU five times the speed of torch's default."""
        parameters, gradients, exp_avg, exp_avg_sq = tensors
        if not parameters:
            return
        table, scale = self._table, update.grad_scale
        step = torch.full((), update.updates + 1.0, device=parameters[0].device)
        torch._fused_adamw_(
            parameters, gradients, exp_avg, exp_avg_sq, [], [step] * len(parameters),
            lr=update.lr, beta1=table.beta1, beta2=table.beta2, eps=table.eps,
            weight_decay=table.weight_decay if decay else 0.0, amsgrad=False, maximize=False,
            grad_scale=None if scale is None else scale.reciprocal(), found_inf=None,
        )  # fmt: skip

    def _coded_adamw(self, spec: ParameterSpec, gradient: Tensor, update: _Update) -> None:
        parameter, gradient = self._parameters[spec.name].view(-1), gradient.reshape(-1)
        first = self._coded_state("exp_avg", spec.name)
        second = self._coded_state("exp_avg_sq", spec.name)
        for start in range(0, parameter.numel(), CHUNK_ELEMENTS):
            chunk = slice(start, start + CHUNK_ELEMENTS)
            exp_avg, exp_avg_sq = first.decode(chunk), second.decode(chunk)
            tensors = ([parameter[chunk]], [gradient[chunk]], [exp_avg], [exp_avg_sq])
            self._adamw(tensors, update, decay=spec.decay)
            first.encode(chunk, exp_avg)
            second.encode(chunk, exp_avg_sq)

    def _coded_state(self, state: State, parameter: str) -> CodedState:
        name = f"{state}.{parameter}"
        return CodedState(state, self._states[name].view(-1), self._states[f"{name}.absmax"])

    def _momentum(self, updates: int) -> float:
        table = self._table
        if updates >= table.momentum_warmup_steps:
            return table.momentum
        done = updates / table.momentum_warmup_steps
        return table.momentum_start + (table.momentum - table.momentum_start) * done

    def _orthogonal_step(
        self, names: list[str], gradients: Mapping[str, Tensor], update: _Update
    ) -> None:
        lr, momentum = update.lr, self._momentum(update.updates)
        stacked = torch.stack([gradients[name] for name in names])  # [N, R, C]
        if update.grad_scale is not None:
            stacked.mul_(update.grad_scale)
        for name, gradient in zip(names, stacked, strict=True):
            self._accumulate(name, gradient, momentum)
        directions = orthogonalize(stacked)
        rate = -lr * 0.2 * math.sqrt(max(stacked.shape[1:]))
        for name, direction in zip(names, directions, strict=True):
            parameter = self._parameters[name]
            parameter.mul_(1 - lr * self._table.weight_decay).add_(direction, alpha=rate)

    def _accumulate(self, name: str, gradient: Tensor, momentum: float) -> None:
        """Take the gradient into the momentum and leave Nesterov's mean of both in `gradient`."""
        stored = self._states[f"momentum_buffer.{name}"]
        if stored.dtype == torch.float32:
            gradient.lerp_(stored.lerp_(gradient, 1 - momentum), momentum)
            return
        state, flat = self._coded_state("momentum_buffer", name), gradient.view(-1)
        for start in range(0, flat.numel(), CHUNK_ELEMENTS):
            chunk = slice(start, start + CHUNK_ELEMENTS)
            buffer = state.decode(chunk).lerp_(flat[chunk], 1 - momentum)
            flat[chunk] = flat[chunk].lerp(buffer, momentum)
            state.encode(chunk, buffer)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest half-orthogonal matrices, roughly: fp32 [N, R, C] to the same shape with singular
    values near 1, by five Newton-Schulz steps on each (Jordan 2024). The shorter side is squared.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x.mT @ x if tall else x @ x.mT  # [N, S, S], S = min(R, C)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (x, polynomial) if tall else (polynomial, x)
        x = torch.baddbmm(x, left, right, beta=a)
    return x
