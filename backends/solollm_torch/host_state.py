"""The whole state of a model in the host's memory, as the streaming session keeps it.

Every block has one buffer in the order of `layout`; what stands at the model's ends (embedding,
norm, untied head) has another. By canonical name all of it is what any session exports and imports:
`masters` and `states` are views, and the order of `states` is that of the file.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from solollm.architecture import ModelConfig, ParameterSpec, parameter_table
from solollm.config import OptimizerTable
from solollm_torch.lanes import Lanes
from solollm_torch.layout import BlockLayout, BlockViews, Section, end_specs
from solollm_torch.masters import WEIGHT_DTYPES, Master, Masters
from solollm_torch.state import TORCH_DTYPES
from solollm_torch.state_specs import set_to_zero, state_specs


class HostState:
    """Buffers and their views. Whoever writes here tells the device to read again."""

    def __init__(
        self, model: ModelConfig, table: OptimizerTable, master: Master, lanes: Lanes
    ) -> None:
        self.master = master
        self.layout = BlockLayout.of(model, table, master)
        self.block_weights: list[Tensor] = []
        self.block_updates: list[Tensor] = []  # residuals and states
        weights: dict[str, Tensor] = {}
        residuals: dict[str, Tensor] = {}
        states: dict[str, Tensor] = {}
        size = self.layout.weight_bytes
        for index in range(model.num_hidden_layers):
            buffer = lanes.host_buffer(size + self.layout.update_bytes)
            self.block_weights.append(buffer[:size])
            self.block_updates.append(buffer[size:])
            views = BlockViews(self.layout, model, (buffer[:size], buffer[size:]))
            weights |= views.weights(index)
            residuals |= views.residuals(index)
            states |= views.states(index)
        for spec in end_specs(model):
            section = ends_section(spec, table, master)
            held = section.views(lanes.host_buffer(section.num_bytes))
            weights[spec.name] = held.pop("weight")
            if "residual" in held:
                residuals[spec.name] = held.pop("residual")
            states |= held
        order = parameter_table(model)
        names = [name for name, _, _ in state_specs(order, table)]
        self.masters = Masters({spec.name: weights[spec.name] for spec in order}, residuals)
        self.states = {name: states[name] for name in names}

    @torch.no_grad()
    def begin(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over initial weights, one tensor at a time, and states of zero."""
        for name, weight in weights:
            self.masters.write(name, weight)
        for name, state in self.states.items():
            set_to_zero(name, state)


def ends_section(spec: ParameterSpec, table: OptimizerTable, master: Master) -> Section:
    """Where one of them, its residual and its states lie."""
    tensors = [("weight", WEIGHT_DTYPES[master], spec.shape)]
    if master == "split":
        tensors.append(("residual", torch.int16, spec.shape))
    tensors += [(n, TORCH_DTYPES[tag], shape) for n, tag, shape in state_specs([spec], table)]
    return Section.of(tensors)
