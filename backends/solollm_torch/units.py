"""What is updated at once: each block, and before and after them what stands at the model's ends.

Streaming holds one block at a time, and an update inside the backward pass has the gradients of
one at a time. Muon stacks the matrices of a unit, so the same units everywhere give the same bits.

`clip = "lagged"`: the norm of all gradients is known only when the last unit's are there, so each
unit is scaled by the norm of the step before. Units come in the order of the backward pass. Whether
gradients are finite is decided on the device, unit by unit: from the first that are not, nothing is
updated any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from solollm.architecture import ModelConfig, parameter_table
from solollm.config import OptimizerTable
from solollm_torch.masters import Masters
from solollm_torch.model import Decoder
from solollm_torch.optim import Optimizer


class UnitNames(NamedTuple):
    """Canonical names. `top` is complete first in the backward pass (norm, untied head), `bottom`
    last (the embedding, with a tied head)."""

    top: list[str]
    blocks: list[list[str]]
    bottom: list[str]

    @classmethod
    def of(cls, model: ModelConfig) -> UnitNames:
        blocks: list[list[str]] = [[] for _ in range(model.num_hidden_layers)]
        top: list[str] = []
        bottom: list[str] = []
        for spec in parameter_table(model):
            parts = spec.name.split(".")
            if parts[1] == "layers":
                blocks[int(parts[2])].append(spec.name)
            else:
                (bottom if parts[1] == "embed_tokens" else top).append(spec.name)
        return cls(top, blocks, bottom)

    @property
    def backward_order(self) -> list[list[str]]:
        return [self.top, *reversed(self.blocks), self.bottom]


def unit_optimizers(
    model: ModelConfig,
    table: OptimizerTable,
    masters: Masters,
    *,
    states: Mapping[str, Tensor],
    seed: int,
) -> list[Optimizer]:
    """One optimizer per unit, in backward order, over shared weights and states."""
    return [
        Optimizer(
            {name: masters.weights[name] for name in names},
            model=model,
            table=table,
            residuals=masters.residuals,
            states=states_of_unit(states, names),
            seed=seed,
        )
        for names in UnitNames.of(model).backward_order
    ]


def states_of_unit(states: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Those states that belong to some parameters."""
    wanted = set(names)
    return {
        name: state
        for name, state in states.items()
        if name.partition(".")[2].removesuffix(".absmax") in wanted
    }


def unit_parameters(decoder: Decoder) -> list[list[nn.Parameter]]:
    """The stored parameters of every unit, in backward order."""
    head = [] if decoder.lm_head is None else [decoder.lm_head]
    blocks = [list(block.parameters()) for block in decoder.layers]
    return [[decoder.norm, *head], *reversed(blocks), [decoder.embed_tokens]]


def gradient_norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each, fp32 0-dim, on the device."""
    return list(torch._foreach_norm(list(gradients), dtype=torch.float32))


def total_norm(norms: Sequence[Sequence[Tensor]]) -> Tensor:
    """The norm of all gradients, fp32 0-dim, from those of every unit in backward order."""
    top, *blocks, bottom = norms
    ordered = [*bottom, *top, *chain(*reversed(blocks))]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(ordered))
    return norm


def clip_factor(limit: float, norm: Tensor, norm_on_host: float) -> Tensor | None:
    """min(1, limit / (norm + 1e-6)), fp32 0-dim, or None where that is exactly 1 (limit 0: always).
    `norm_on_host`: what `norm` holds."""
    if limit == 0 or norm_on_host + 1e-6 <= limit:
        return None
    return limit / (norm + 1e-6)


class LaggedStep:
    """One step whose units are updated as their gradients come."""

    def __init__(self, *, lr: float, updates: int, grad_scale: Tensor | None) -> None:
        self.lr, self.updates, self.grad_scale = lr, updates, grad_scale
        self._found_inf: Tensor | None = None
        self._applied: list[Tensor] = []

    def begin(self, loss: Tensor) -> None:
        """Before the last backward pass: with the loss of the whole step, as far as it is known."""
        self._found_inf = _is_bad(loss)

    def update(
        self, optimizer: Optimizer, gradients: Mapping[str, Tensor], norms: Sequence[Tensor]
    ) -> None:
        """`norms`: of all gradients of the unit, and of nothing else."""
        assert self._found_inf is not None, "the step has begun"
        self._found_inf = torch.maximum(self._found_inf, _is_bad(torch.stack(list(norms)).sum()))
        self._applied.append(1 - self._found_inf)
        optimizer.step(
            gradients, lr=self.lr, updates=self.updates, grad_scale=self.grad_scale,
            found_inf=self._found_inf,
        )  # fmt: skip

    def num_applied(self) -> Tensor:
        """How many units were updated, fp32 0-dim on the device."""
        return torch.stack(self._applied).sum()


def _is_bad(value: Tensor) -> Tensor:
    return (~torch.isfinite(value)).float()
