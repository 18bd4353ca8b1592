"""Where the bytes of a block lie in one buffer: what is streamed is one copy.

    [ weights | residuals, states ]

The weights come first, in the decoder's own (fused) storage, because forward and backward stream
nothing else; what an update needs besides follows. Every tensor begins on a cache line. The same
layout serves the host's memory and the device's slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from solollm.architecture import ModelConfig, ParameterSpec, parameter_table
from solollm.config import OptimizerTable
from solollm_torch.masters import WEIGHT_DTYPES, Master
from solollm_torch.model import Block
from solollm_torch.state import TORCH_DTYPES
from solollm_torch.state_specs import state_specs

ALIGNMENT = 64  # bytes


class Field(NamedTuple):
    """One tensor of a section."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, section: Tensor) -> Tensor:
        """The tensor in a section's bytes."""
        flat = section[self.start : self.start + self.num_bytes]
        return flat.view(self.dtype).view(self.shape)


class Section(NamedTuple):
    """Fields one after the other."""

    fields: tuple[Field, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Section:
        fields, end = [], 0
        for name, dtype, shape in tensors:
            field = Field(name, dtype, shape, end)
            fields.append(field)
            end += -(-field.num_bytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(fields), end)

    def views(self, section: Tensor) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {field.name: field.view(section) for field in self.fields}


class BlockLayout(NamedTuple):
    """`weights` and `residuals` by the name of the stored parameter (`qkv_proj`, ...), `states` by
    their canonical name without `model.layers.<index>.`."""

    weights: Section
    residuals: Section
    states: Section

    @classmethod
    def of(cls, model: ModelConfig, table: OptimizerTable, master: Master) -> BlockLayout:
        dtype = WEIGHT_DTYPES[master]
        stored = [
            (name, tuple(p.shape))
            for name, p in Block(model, torch.device("meta"), dtype).named_parameters()
        ]
        specs = [s for s in parameter_table(model) if s.name.startswith("model.layers.0.")]
        states = [
            (name.replace("model.layers.0.", "", 1), TORCH_DTYPES[tag], shape)
            for name, tag, shape in state_specs(specs, table)
        ]
        halves = stored if master == "split" else []
        return cls(
            Section.of((name, dtype, shape) for name, shape in stored),
            Section.of((name, torch.int16, shape) for name, shape in halves),
            Section.of(states),
        )

    @property
    def weight_bytes(self) -> int:
        return self.weights.num_bytes

    @property
    def update_bytes(self) -> int:
        """Of residuals and states."""
        return self.residuals.num_bytes + self.states.num_bytes


class BlockViews:
    """The tensors of one block in a buffer of weights and one of residuals and states."""

    def __init__(self, layout: BlockLayout, model: ModelConfig, buffers: tuple[Tensor, Tensor]):
        weights, rest = buffers
        self.block = block_over(model, layout.weights.views(weights))
        split = layout.residuals.num_bytes
        self._residuals = layout.residuals.views(rest[:split])
        self._states = layout.states.views(rest[split:])

    def weights(self, index: int) -> dict[str, Tensor]:
        """Canonical name -> weight, as block `index`."""
        return _prefixed(index, self.block.canonical_views(lambda p: p.data))

    def residuals(self, index: int) -> dict[str, Tensor]:
        """Canonical name -> residual; empty where weights are not split."""
        if not self._residuals:
            return {}
        by_parameter = {p: self._residuals[name] for name, p in self.block.named_parameters()}
        return _prefixed(index, self.block.canonical_views(lambda p: by_parameter[p]))

    def states(self, index: int) -> dict[str, Tensor]:
        """State name as on disk -> state."""
        named = {}
        for name, state in self._states.items():
            kind, _, rest = name.partition(".")
            named[f"{kind}.model.layers.{index}.{rest}"] = state
        return named


def block_over(model: ModelConfig, weights: Mapping[str, Tensor]) -> Block:
    """A block whose parameters are these tensors.

    Autograd is told nothing of what is written into their buffer: it would refuse the backward pass
    of a block whose weights have left their slot and come back since.
    """
    block = Block(model, torch.device("meta"), next(iter(weights.values())).dtype)
    for name, weight in weights.items():
        setattr(block, name, torch.nn.Parameter(weight.data))
    return block


def _prefixed(index: int, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.layers.{index}.{name}.weight": view for name, view in views.items()}


def end_specs(model: ModelConfig) -> list[ParameterSpec]:
    """The parameters outside of the blocks: embedding, norm, untied head."""
    return [spec for spec in parameter_table(model) if ".layers." not in spec.name]


def update_bytes_per_element(spec: ParameterSpec, table: OptimizerTable, master: Master) -> int:
    """Of the residual and the states of a parameter outside of the blocks (never 8-bit codes)."""
    states = (TORCH_DTYPES[tag].itemsize for _, tag, _ in state_specs([spec], table))
    return (2 if master == "split" else 0) + sum(states)


def slot_bytes(model: ModelConfig, table: OptimizerTable, master: Master, chunk: int) -> int:
    """What an update needs on the device at once: a block's residuals and states, or a stretch of
    at least one `chunk` of elements of a parameter outside of the blocks."""
    stretch = max(
        min(chunk, math.prod(spec.shape)) * update_bytes_per_element(spec, table, master)
        for spec in end_specs(model)
    )
    padding = ALIGNMENT * 4  # before each tensor of a stretch
    return max(BlockLayout.of(model, table, master).update_bytes, stretch) + padding


def stretches(spec: ParameterSpec, most: int, chunk: int) -> Iterator[slice]:
    """A parameter's elements in stretches of whole chunks, of up to `most` elements each. Only the
    last one may end within a chunk."""
    size, count = max(chunk, most // chunk * chunk), math.prod(spec.shape)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
