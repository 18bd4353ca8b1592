"""Which optimizer states a parameter has: their names on disk, dtypes, shapes and first values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from solollm.architecture import ParameterSpec
from solollm.backend import DType
from solollm.config import OptimizerTable
from solollm.optim_codec import State, codebook, num_blocks, state_dtype
from solollm_torch.paged import paged_empty


def states_of(spec: ParameterSpec, table: OptimizerTable) -> tuple[State, ...]:
    """Muon's one for block matrices, AdamW's two for everything else."""
    if table.name == "muon" and spec.group == "matrix":
        return ("momentum_buffer",)
    return ("exp_avg", "exp_avg_sq")


def state_specs(
    specs: Iterable[ParameterSpec], table: OptimizerTable
) -> Iterator[tuple[str, DType, tuple[int, ...]]]:
    """Name, dtype and shape of every state, in the order of a file."""
    for spec in specs:
        dtype = state_dtype(spec.shape, spec.group, table.state_bits)
        for state in states_of(spec, table):
            name = f"{state}.{spec.name}"
            yield name, dtype, spec.shape
            if dtype == "U8":
                yield f"{name}.absmax", "F32", (num_blocks(spec.shape),)


def set_to_zero(name: str, state: Tensor) -> None:
    """The state's value before the first update; code 0 of a signed table is not zero."""
    if state.dtype == torch.uint8:
        kind: State = "exp_avg_sq" if name.startswith("exp_avg_sq.") else "exp_avg"
        state.fill_(int(codebook(kind).borders.searchsorted(0.0)))
    else:
        state.zero_()


def zero_states(
    specs: Iterable[ParameterSpec], table: OptimizerTable, devices: Mapping[str, torch.device]
) -> dict[str, Tensor]:
    """New states, each on its parameter's device; in pages if the table says so."""
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
    states = {}
    for spec in specs:
        device = devices[spec.name]
        pages = table.paged and device.type != "meta"  # which holds shapes alone
        empty: Callable[..., Tensor] = paged_empty if pages else torch.empty
        for name, dtype, shape in state_specs([spec], table):
            states[name] = empty(shape, dtype=dtypes[dtype], device=device)
            set_to_zero(name, states[name])
    return states
