"""AdamW over canonical tensors in NumPy, with fp32 or 8-bit states: the toy backend's optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from solollm.architecture import ModelConfig, ParameterSpec, parameter_table
from solollm.config import OptimizerTable
from solollm.optim_codec import Quantized, State, dequantize, is_quantized, quantize


class ToyOptimizer:
    """`states`: the arrays as they lie on disk, `exp_avg.<name>` and the rest."""

    def __init__(self, model: ModelConfig, table: OptimizerTable) -> None:
        self._specs = parameter_table(model)
        self._table = table
        self.states: dict[str, np.ndarray] = {}
        for spec in self._specs:
            for state in ("exp_avg", "exp_avg_sq"):
                self.states |= self._stored(state, spec, np.zeros(spec.shape, np.float32))

    def step(
        self,
        weights: Mapping[str, np.ndarray],
        gradients: Mapping[str, np.ndarray],
        *,
        lr: float,
        updates: int,
    ) -> None:
        """One update in place; a tensor without an entry in `gradients` has a gradient of zero.

        AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101: decoupled decay, bias correction by
        updates + 1, eps added to the corrected root.
        """
        table, count = self._table, updates + 1
        correction1, correction2 = 1 - table.beta1**count, 1 - table.beta2**count
        for spec in self._specs:
            gradient = gradients.get(spec.name, np.float32(0))
            first, second = self._values("exp_avg", spec), self._values("exp_avg_sq", spec)
            first += np.float32(1 - table.beta1) * (gradient - first)
            second += np.float32(1 - table.beta2) * (gradient * gradient - second)
            divisor = np.sqrt(second / np.float32(correction2)) + np.float32(table.eps)
            weight = weights[spec.name]
            if spec.decay:
                weight *= np.float32(1 - lr * table.weight_decay)
            weight -= np.float32(lr / correction1) * first / divisor
            self.states |= self._stored("exp_avg", spec, first)
            self.states |= self._stored("exp_avg_sq", spec, second)

    def _is_coded(self, spec: ParameterSpec) -> bool:
        return self._table.state_bits == 8 and is_quantized(spec.shape, spec.group)

    def _stored(
        self, state: State, spec: ParameterSpec, values: np.ndarray
    ) -> dict[str, np.ndarray]:
        name = f"{state}.{spec.name}"
        if not self._is_coded(spec):
            return {name: values}
        codes, absmax = quantize(values, state)
        return {name: codes, f"{name}.absmax": absmax}

    def _values(self, state: State, spec: ParameterSpec) -> np.ndarray:
        name = f"{state}.{spec.name}"
        if not self._is_coded(spec):
            return self.states[name]
        return dequantize(Quantized(self.states[name], self.states[f"{name}.absmax"]), state)
