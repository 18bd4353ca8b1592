"""AdamW and Muon over canonical tensors, with fp32 or 8-bit states.

The formulas are those of `solollm_torch/optim.py`; MLX's own optimizers are not used, because its
AdamW leaves out bias correction by default and its Muon couples the weight decay. Arrays are
immutable, so an update makes new ones; it goes through the tensors in groups, and a group's old
arrays are gone before the next group but one is begun. In one graph over all tensors the whole
state would be held twice.

States are a flat dict, named as they lie on disk; 8-bit states are decoded, updated and encoded
again by `codec`.

Shapes: N matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from solollm.architecture import ParameterSpec
from solollm.config import OptimizerTable
from solollm.optim_codec import State, codebook, is_quantized, num_blocks
from solollm_mlx.codec import dequantize, quantize

Arrays = dict[str, mx.array]
GROUP_ELEMENTS = 1 << 22  # of the tensors updated at once: bounds what is held twice
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024, https://kellerjordan.github.io/posts/muon
NEWTON_SCHULZ_STEPS = 5


class Kind(NamedTuple):
    """What decides a tensor's formula: its optimizer, 8-bit states or not, decayed or not."""

    is_muon: bool
    is_coded: bool
    decays: bool

    @property
    def states(self) -> tuple[State, ...]:
        return ("momentum_buffer",) if self.is_muon else ("exp_avg", "exp_avg_sq")

    def state_names(self, parameter: str) -> list[str]:
        """Names as on disk, in file order."""
        names = [f"{state}.{parameter}" for state in self.states]
        if not self.is_coded:
            return names
        return [part for name in names for part in (name, f"{name}.absmax")]


class Group(NamedTuple):
    """Parameters of one kind and shape, updated at once."""

    kind: Kind
    names: list[str]
    shape: tuple[int, ...]


class Step(NamedTuple):
    """What every tensor's update shares; scalars on the device.

    `lr` float32; `decay` float32: what a decayed weight is multiplied by; `updates` int32: how many
    were applied before this one; `factor` float32: what gradients are multiplied by (clipping);
    `skipped` bool: nothing is to change.
    """

    lr: mx.array
    decay: mx.array
    updates: mx.array
    factor: mx.array
    skipped: mx.array

    @classmethod
    def of(
        cls,
        lr: float,
        table: OptimizerTable,
        *,
        updates: mx.array,
        factor: mx.array | None = None,
        skipped: mx.array | None = None,
    ) -> Step:
        """`factor` None: 1; `skipped` None: no."""
        return cls(
            lr=mx.array(lr, mx.float32),
            # Rounded once, from float64, as torch does it.
            decay=mx.array(1 - lr * table.weight_decay, mx.float32),
            updates=updates,
            factor=mx.array(1.0) if factor is None else factor,
            skipped=mx.array(False) if skipped is None else skipped,
        )


class Optimizer:
    """Which states each parameter has, and the update of all of them. Holds no arrays.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for every tensor, or Muon (Jordan 2024) for
    the block matrices and AdamW for the rest. Weight decay is decoupled and only where the name
    table says so. A Muon update is scaled by 0.2 sqrt(max(R, C)), so that its root mean square is
    that of AdamW and one lr serves both (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(
        self, trained: Sequence[ParameterSpec], table: OptimizerTable, *, compiled: bool
    ) -> None:
        """`trained`: the name table of what a session trains."""
        self.table = table
        self._specs: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {}
        alike: dict[tuple[Kind, tuple[int, ...]], list[str]] = {}
        for spec in trained:
            kind = _kind(spec, table)
            alike.setdefault((kind, spec.shape), []).append(spec.name)
            self._specs |= _state_specs(kind, spec)
        self._groups = [
            g for (kind, shape), names in alike.items() for g in _cut(kind, names, shape)
        ]
        wrap: Any = mx.compile if compiled else lambda function: function
        self._updates = {kind: wrap(partial(self._update, kind)) for kind, _ in alike}

    def specs(self) -> Mapping[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every state, in table order."""
        return self._specs

    def initial_states(self) -> Arrays:
        """Zeros; where a state is held in 8 bits, the code of zero."""
        return {
            name: mx.full(shape, _zero_code(name) if dtype == mx.uint8 else 0, dtype)
            for name, (dtype, shape) in self._specs.items()
        }

    def step(self, weights: Arrays, states: Arrays, gradients: Arrays, step: Step) -> None:
        """Put new weights and states into the place of the old; the gradients (fp32) are taken out
        of their dict as they are used. The last group is left to be evaluated by the caller."""
        under_way: list[Any] = []
        elements = 0
        for group in self._groups:
            if elements >= GROUP_ELEMENTS:
                mx.eval(under_way)
                under_way, elements = [], 0
            state_names = [group.kind.state_names(name) for name in group.names]
            new_weights, new_states = self._updates[group.kind](
                [weights[name] for name in group.names],
                [[states[name] for name in names] for names in state_names],
                [gradients.pop(name) for name in group.names],
                step,
            )
            weights.update(zip(group.names, new_weights, strict=True))
            for names, new in zip(state_names, new_states, strict=True):
                states.update(zip(names, new, strict=True))
            under_way += [new_weights, new_states]
            elements += len(group.names) * math.prod(group.shape)

    def _update(
        self,
        kind: Kind,
        weights: Sequence[mx.array],
        states: Sequence[Sequence[mx.array]],
        gradients: Sequence[mx.array],
        step: Step,
    ) -> tuple[list[mx.array], list[list[mx.array]]]:  # sizes: what one traced function takes
        lr, decay, updates, factor, skipped = step
        gradients = [gradient * factor for gradient in gradients]
        decoded = [_decode(kind, held) for held in states]
        directions, moved = (self._muon if kind.is_muon else self._adamw)(
            decoded, gradients, updates
        )
        new_weights = []
        for weight, direction in zip(weights, directions, strict=True):
            kept = weight * decay if kind.decays else weight
            new_weights.append(mx.where(skipped, weight, kept - lr * direction))
        new_states = [
            [
                mx.where(skipped, old, new)
                for old, new in zip(held, _encode(kind, values), strict=True)
            ]
            for held, values in zip(states, moved, strict=True)
        ]
        return new_weights, new_states

    def _adamw(
        self, states: list[list[mx.array]], gradients: list[mx.array], updates: mx.array
    ) -> tuple[list[mx.array], list[list[mx.array]]]:
        """The directions to go, and the new states."""
        table = self.table
        correction1, correction2 = (
            _correction(table.beta1, updates),
            _correction(table.beta2, updates),
        )
        directions, moved = [], []
        for (first, second), gradient in zip(states, gradients, strict=True):
            first = table.beta1 * first + (1 - table.beta1) * gradient
            second = table.beta2 * second + (1 - table.beta2) * mx.square(gradient)
            root = mx.sqrt(second) / mx.sqrt(correction2)
            directions.append(first / correction1 / (root + table.eps))
            moved.append([first, second])
        return directions, moved

    def _muon(
        self, states: list[list[mx.array]], gradients: list[mx.array], updates: mx.array
    ) -> tuple[list[mx.array], list[list[mx.array]]]:
        """The directions to go, and the new states."""
        momentum, nesterov, moved = self._momentum(updates), [], []
        for (buffer,), gradient in zip(states, gradients, strict=True):
            buffer = buffer + (1 - momentum) * (gradient - buffer)
            nesterov.append(gradient + momentum * (buffer - gradient))
            moved.append([buffer])
        scale = 0.2 * math.sqrt(max(gradients[0].shape))
        return [scale * matrix for matrix in orthogonalize(mx.stack(nesterov))], moved

    def _momentum(self, updates: mx.array) -> mx.array:
        table = self.table
        if table.momentum_warmup_steps == 0:
            return mx.array(table.momentum, mx.float32)
        done = updates.astype(mx.float32) / table.momentum_warmup_steps
        warming = table.momentum_start + (table.momentum - table.momentum_start) * done
        return mx.where(updates >= table.momentum_warmup_steps, table.momentum, warming)


def orthogonalize(matrices: mx.array) -> mx.array:
    """The nearest half-orthogonal matrices, roughly: fp32 [N, R, C] to the same shape with singular
    values near 1, by five Newton-Schulz steps on each (Jordan 2024). The shorter side is squared.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    norm = mx.sqrt(mx.sum(mx.square(matrices), axis=(1, 2), keepdims=True))
    x = matrices / (norm + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        transposed = x.transpose(0, 2, 1)
        gram = transposed @ x if tall else x @ transposed  # [N, S, S], S = min(R, C)
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    return x


def _kind(spec: ParameterSpec, table: OptimizerTable) -> Kind:
    return Kind(
        is_muon=table.name == "muon" and spec.group == "matrix",
        is_coded=table.state_bits == 8 and is_quantized(spec.shape, spec.group),
        decays=spec.decay and table.weight_decay > 0,
    )


def _state_specs(
    kind: Kind, spec: ParameterSpec
) -> Iterator[tuple[str, tuple[mx.Dtype, tuple[int, ...]]]]:
    for name in kind.state_names(spec.name):
        if name.endswith(".absmax"):
            yield name, (mx.float32, (num_blocks(spec.shape),))
        else:
            yield name, (mx.uint8 if kind.is_coded else mx.float32, spec.shape)


def _cut(kind: Kind, names: list[str], shape: tuple[int, ...]) -> Iterator[Group]:
    size = max(1, GROUP_ELEMENTS // math.prod(shape))
    for start in range(0, len(names), size):
        yield Group(kind, names[start : start + size], shape)


def _decode(kind: Kind, held: Sequence[mx.array]) -> list[mx.array]:
    """The states of one parameter as fp32."""
    if not kind.is_coded:
        return list(held)
    pairs = zip(held[::2], held[1::2], kind.states, strict=True)
    return [dequantize(codes, absmax, state) for codes, absmax, state in pairs]


def _encode(kind: Kind, values: list[mx.array]) -> list[mx.array]:
    """The other way."""
    if not kind.is_coded:
        return values
    coded = [quantize(value, state) for value, state in zip(values, kind.states, strict=True)]
    return [part for pair in coded for part in pair]


def _correction(beta: float, updates: mx.array) -> mx.array:
    """1 - beta^(updates + 1), Adam's bias correction.

    By expm1: 1 - beta^t in float32 loses most of its digits where beta is near one and t small.
    """
    exponent = (updates.astype(mx.float32) + 1) * (math.log(beta) if beta else -math.inf)
    return -mx.expm1(exponent)


def _zero_code(name: str) -> int:
    state: State = "exp_avg_sq" if name.startswith("exp_avg_sq.") else "exp_avg"
    return int(codebook(state).borders.searchsorted(0.0))
