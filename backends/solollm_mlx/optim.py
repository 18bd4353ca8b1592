"""AdamW and Muon over canonical tensors, with fp32 or 8-bit states.

Pure functions of (weights, states, gradients), so that an update is one compiled graph. The
formulas are those of `solollm_torch/optim.py`; MLX's own optimizers are not used, because its AdamW
leaves out bias correction by default and its Muon couples the weight decay.

States are a flat dict, named as they lie on disk; 8-bit states are decoded, updated and encoded
again by `codec`.

Shapes: N matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from solollm.architecture import ModelConfig, ParameterSpec, parameter_table
from solollm.config import OptimizerTable
from solollm.optim_codec import State, codebook, is_quantized, num_blocks
from solollm_mlx.codec import dequantize, quantize

Arrays = dict[str, mx.array]
MUON_BATCH_ELEMENTS = 1 << 22  # matrices orthogonalised at once: bounds the scratch memory
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024, https://kellerjordan.github.io/posts/muon
NEWTON_SCHULZ_STEPS = 5


class Rates(NamedTuple):
    """What every tensor's update shares, each a float32 scalar. `decay`: what a decayed weight is
    multiplied by."""

    lr: mx.array
    decay: mx.array

    @classmethod
    def of(cls, lr: float, table: OptimizerTable) -> Rates:
        # 1 - lr * decay is rounded once, from float64, as torch does it.
        return cls(mx.array(lr, mx.float32), mx.array(1 - lr * table.weight_decay, mx.float32))


class Optimizer:
    """Which states each parameter has, and the update of all of them. Holds no arrays.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for every tensor, or Muon (Jordan 2024) for
    the block matrices and AdamW for the rest. Weight decay is decoupled and only where the name
    table says so. A Muon update is scaled by 0.2 sqrt(max(R, C)), so that its root mean square is
    that of AdamW and one lr serves both (Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(self, model: ModelConfig, table: OptimizerTable) -> None:
        self.table = table
        self._adamw: list[ParameterSpec] = []
        self._coded: set[str] = set()
        self._specs: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {}
        matrices: dict[tuple[int, ...], list[ParameterSpec]] = {}
        for spec in parameter_table(model):
            if table.state_bits == 8 and is_quantized(spec.shape, spec.group):
                self._coded.add(spec.name)
            if table.name == "muon" and spec.group == "matrix":
                matrices.setdefault(spec.shape, []).append(spec)
                self._specify("momentum_buffer", spec)
                continue
            self._adamw.append(spec)
            self._specify("exp_avg", spec)
            self._specify("exp_avg_sq", spec)
        self._muon = [batch for specs in matrices.values() for batch in _batches(specs)]

    def _specify(self, state: State, spec: ParameterSpec) -> None:
        name, coded = f"{state}.{spec.name}", spec.name in self._coded
        self._specs[name] = (mx.uint8 if coded else mx.float32, spec.shape)
        if coded:
            self._specs[f"{name}.absmax"] = (mx.float32, (num_blocks(spec.shape),))

    def specs(self) -> Mapping[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every state, in table order."""
        return self._specs

    def initial_states(self) -> Arrays:
        """Zeros; where a state is held in 8 bits, the code of zero."""
        return {
            name: mx.full(shape, _zero_code(name) if dtype == mx.uint8 else 0, dtype)
            for name, (dtype, shape) in self._specs.items()
        }

    def update(
        self, weights: Arrays, states: Arrays, gradients: Arrays, *, rates: Rates, updates: mx.array
    ) -> tuple[Arrays, Arrays]:
        """New weights and new states, in the order of the old.

        `gradients`: fp32 and already clipped. `updates`: int32 scalar, how many were applied before
        this one.
        """
        new_weights, new_states = dict(weights), dict(states)
        for spec in self._adamw:
            weight, gradient = weights[spec.name], gradients[spec.name]
            step, moved = self._adamw_step(spec, states, gradient, updates)
            new_states |= moved
            new_weights[spec.name] = _decayed(spec, weight, rates) - rates.lr * step
        momentum = self._momentum(updates)
        for specs in self._muon:
            directions = []
            for spec in specs:
                direction, moved = self._accumulate(spec, states, gradients[spec.name], momentum)
                directions.append(direction)
                new_states |= moved
            scale = rates.lr * (0.2 * math.sqrt(max(specs[0].shape)))
            for spec, step in zip(specs, orthogonalize(mx.stack(directions)), strict=True):
                weight = weights[spec.name]
                new_weights[spec.name] = _decayed(spec, weight, rates) - scale * step
        return new_weights, new_states

    def _adamw_step(
        self, spec: ParameterSpec, states: Arrays, gradient: mx.array, updates: mx.array
    ) -> tuple[mx.array, Arrays]:
        """The direction to go, and the new states."""
        table = self.table
        first = self._load("exp_avg", spec, states)
        second = self._load("exp_avg_sq", spec, states)
        first = table.beta1 * first + (1 - table.beta1) * gradient
        second = table.beta2 * second + (1 - table.beta2) * mx.square(gradient)
        moved = self._store("exp_avg", spec, first) | self._store("exp_avg_sq", spec, second)
        root = mx.sqrt(second) / mx.sqrt(_correction(table.beta2, updates))
        return first / _correction(table.beta1, updates) / (root + table.eps), moved

    def _momentum(self, updates: mx.array) -> mx.array:
        table = self.table
        if table.momentum_warmup_steps == 0:
            return mx.array(table.momentum, mx.float32)
        done = updates.astype(mx.float32) / table.momentum_warmup_steps
        warming = table.momentum_start + (table.momentum - table.momentum_start) * done
        return mx.where(updates >= table.momentum_warmup_steps, table.momentum, warming)

    def _accumulate(
        self, spec: ParameterSpec, states: Arrays, gradient: mx.array, momentum: mx.array
    ) -> tuple[mx.array, Arrays]:
        """Nesterov's mean of the gradient and the new momentum; and the new state."""
        stored = self._load("momentum_buffer", spec, states)
        buffer = stored + (1 - momentum) * (gradient - stored)
        nesterov = gradient + momentum * (buffer - gradient)
        return nesterov, self._store("momentum_buffer", spec, buffer)

    def _load(self, state: State, spec: ParameterSpec, states: Arrays) -> mx.array:
        name = f"{state}.{spec.name}"
        if spec.name not in self._coded:
            return states[name]
        return dequantize(states[name], states[f"{name}.absmax"], state)

    def _store(self, state: State, spec: ParameterSpec, values: mx.array) -> Arrays:
        name = f"{state}.{spec.name}"
        if spec.name not in self._coded:
            return {name: values}
        codes, absmax = quantize(values, state)
        return {name: codes, f"{name}.absmax": absmax}


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


def _batches(specs: list[ParameterSpec]) -> list[list[ParameterSpec]]:
    size = max(1, MUON_BATCH_ELEMENTS // math.prod(specs[0].shape))
    return [specs[start : start + size] for start in range(0, len(specs), size)]


def _decayed(spec: ParameterSpec, weight: mx.array, rates: Rates) -> mx.array:
    return weight * rates.decay if spec.decay else weight


def _correction(beta: float, updates: mx.array) -> mx.array:
    """1 - beta^(updates + 1), Adam's bias correction.

    By expm1: 1 - beta^t in float32 loses most of its digits where beta is near one and t small.
    """
    exponent = (updates.astype(mx.float32) + 1) * (math.log(beta) if beta else -math.inf)
    return -mx.expm1(exponent)


def _zero_code(name: str) -> int:
    state: State = "exp_avg_sq" if name.startswith("exp_avg_sq.") else "exp_avg"
    return int(codebook(state).borders.searchsorted(0.0))
