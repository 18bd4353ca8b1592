"""AdamW and Muon as pure functions of (weights, states, gradients).

The formulas are those of `solollm_torch/optim.py`; MLX's own optimizers are not used, because its
AdamW leaves out bias correction by default and its Muon couples the weight decay. Everything is
float32; an update that is not finite leaves weights and states as they were.

States are a flat dict, `exp_avg.<name>`, `exp_avg_sq.<name>`, `momentum_buffer.<name>`; a state
held in 8 bits is uint8 codes under that name and `<state>.<name>.absmax` (see
`solollm.optim_codec`).
"""

from __future__ import annotations

import math

import mlx.core as mx

from solollm.architecture import ModelConfig, ParameterSpec, parameter_table
from solollm.config import OptimizerTable
from solollm.optim_codec import BLOCK_SIZE, State, codebook, is_quantized, num_blocks

Arrays = dict[str, mx.array]
# Jordan 2024, kellerjordan.github.io/posts/muon: five steps bring singular values near one.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Optimizer:
    """Which state each parameter has, and the update of all of them. Holds no arrays."""

    def __init__(self, model: ModelConfig, table: OptimizerTable) -> None:
        self.table = table
        self.specs: dict[str, ParameterSpec] = {s.name: s for s in parameter_table(model)}

    def states_of(self, spec: ParameterSpec) -> tuple[State, ...]:
        """The states a parameter has: Muon's one for block matrices, Adam's two for the rest."""
        if self.table.name == "muon" and spec.group == "matrix":
            return ("momentum_buffer",)
        return ("exp_avg", "exp_avg_sq")

    def quantized(self, spec: ParameterSpec) -> bool:
        return self.table.state_bits == 8 and is_quantized(spec.shape, spec.group)

    def state_shapes(self) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every state tensor, in file order."""
        shapes: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {}
        for spec in self.specs.values():
            for state in self.states_of(spec):
                name = f"{state}.{spec.name}"
                coded = self.quantized(spec)
                shapes[name] = (mx.uint8 if coded else mx.float32, spec.shape)
                if coded:
                    shapes[f"{name}.absmax"] = (mx.float32, (num_blocks(spec.shape),))
        return shapes

    def initial_states(self) -> Arrays:
        """Zeros; codes of zero where a state is held in 8 bits."""
        states: Arrays = {}
        for spec in self.specs.values():
            for state in self.states_of(spec):
                zeros = mx.zeros(spec.shape, mx.float32)
                states |= self._store(spec, state, zeros)
        return states

    def update(
        self, weights: Arrays, states: Arrays, gradients: Arrays, *, lr: mx.array, updates: mx.array
    ) -> tuple[Arrays, Arrays]:
        """New weights and states. lr float32 scalar; updates: int32 scalar, those applied before.

        Gradients are fp32 and already clipped.
        """
        count = updates.astype(mx.float32) + 1.0
        momentum = self._momentum(updates)
        new_weights, new_states = {}, {}
        for name, spec in self.specs.items():
            weight, gradient = weights[name], gradients[name]
            if spec.decay:
                weight = weight * (1.0 - lr * self.table.weight_decay)
            if self.table.name == "muon" and spec.group == "matrix":
                buffer = self._load(spec, "momentum_buffer", states)
                buffer = momentum * buffer + (1.0 - momentum) * gradient
                direction = (1.0 - momentum) * gradient + momentum * buffer  # Nesterov
                step = orthogonalize(direction) * (0.2 * math.sqrt(max(spec.shape)))
                new_states |= self._store(spec, "momentum_buffer", buffer)
                new_weights[name] = weight - lr * step
                continue
            beta1, beta2 = self.table.beta1, self.table.beta2
            first = self._load(spec, "exp_avg", states)
            second = self._load(spec, "exp_avg_sq", states)
            first = beta1 * first + (1.0 - beta1) * gradient
            second = beta2 * second + (1.0 - beta2) * mx.square(gradient)
            correction1, correction2 = 1.0 - beta1**count, 1.0 - beta2**count
            divisor = mx.sqrt(second) / mx.sqrt(correction2) + self.table.eps
            new_weights[name] = weight - (lr / correction1) * (first / divisor)
            new_states |= self._store(spec, "exp_avg", first)
            new_states |= self._store(spec, "exp_avg_sq", second)
        return new_weights, new_states

    def _momentum(self, updates: mx.array) -> mx.array:
        table = self.table
        if table.momentum_warmup_steps == 0:
            return mx.array(table.momentum, mx.float32)
        part = mx.minimum(updates.astype(mx.float32) / table.momentum_warmup_steps, 1.0)
        return table.momentum_start + part * (table.momentum - table.momentum_start)

    def _load(self, spec: ParameterSpec, state: State, states: Arrays) -> mx.array:
        stored = states[f"{state}.{spec.name}"]
        if not self.quantized(spec):
            return stored
        return dequantize(stored, states[f"{state}.{spec.name}.absmax"], state)

    def _store(self, spec: ParameterSpec, state: State, values: mx.array) -> Arrays:
        name = f"{state}.{spec.name}"
        if not self.quantized(spec):
            return {name: values}
        codes, absmax = quantize(values, state)
        return {name: codes, f"{name}.absmax": absmax}


def orthogonalize(matrix: mx.array) -> mx.array:
    """The nearest semi-orthogonal matrix, roughly, of a float32 [rows, cols]."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (mx.sqrt(mx.sum(mx.square(x))) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def quantize(values: mx.array, state: State) -> tuple[mx.array, mx.array]:
    """`optim_codec.quantize` in MLX, bit for bit: (uint8 codes, float32 absmax)."""
    borders = mx.array(codebook(state).borders)
    flat = values.reshape(-1)
    if state == "exp_avg_sq":
        flat = mx.sqrt(flat)
    size = flat.size
    padded = mx.pad(flat, (0, num_blocks(values.shape) * BLOCK_SIZE - size))
    blocks = padded.reshape(-1, BLOCK_SIZE)
    absmax = mx.abs(blocks).max(axis=1)
    scaled = (blocks / mx.where(absmax > 0, absmax, 1.0)[:, None]).reshape(-1)
    # How many borders lie below: a binary search over 255 borders, one bit of the code at a time.
    codes = mx.zeros(scaled.shape, mx.int32)
    for bit in (128, 64, 32, 16, 8, 4, 2, 1):
        codes = codes + mx.where(borders[codes + (bit - 1)] < scaled, bit, 0)
    return codes[:size].astype(mx.uint8).reshape(values.shape), absmax


def dequantize(codes: mx.array, absmax: mx.array, state: State) -> mx.array:
    """`optim_codec.dequantize` in MLX, bit for bit."""
    levels = mx.array(codebook(state).levels)
    scale = mx.repeat(absmax, BLOCK_SIZE)[: codes.size]
    values = levels[codes.reshape(-1).astype(mx.int32)] * scale
    if state == "exp_avg_sq":
        values = values * values
    return values.reshape(codes.shape)
