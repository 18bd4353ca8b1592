"""Torch tensors to and from the bits that cross the seam, and the snapshot made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from solollm.backend import BITS_DTYPE, DType, HostTensor, Snapshot, TensorSource
from solollm.config import OptimizerTable
from solollm.errors import IntegrityError
from solollm_torch.masters import Masters

TAGS: Mapping[torch.dtype, DType] = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int16: "I16", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip
TORCH_DTYPES: Mapping[str, torch.dtype] = {tag: dtype for dtype, tag in TAGS.items()}
Specs = Sequence[tuple[str, DType, tuple[int, ...]]]


def to_host(tensor: Tensor) -> HostTensor:
    """A tensor's bits on the host; shares its memory where it is a contiguous CPU tensor."""
    tag = TAGS[tensor.dtype]
    bits = tensor.detach().cpu().contiguous()
    if tag == "BF16":
        bits = bits.view(torch.int16)  # NumPy has no bf16
    return HostTensor(tag, tuple(tensor.shape), bits.numpy().view(BITS_DTYPE[tag]))


def from_host(host: HostTensor) -> Tensor:
    """A CPU tensor of the same bits; shares memory where that is writable (torch needs it so)."""
    data = host.data if host.data.flags.writeable else host.data.copy()
    if host.dtype == "BF16":
        data = data.view(np.int16)
    return torch.from_numpy(data).view(TORCH_DTYPES[host.dtype]).view(host.shape)


class TorchSnapshot(Snapshot):
    """A copy of the state on the host, taken whole so that training may go on at once."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        session_state: Mapping[str, int | float],
    ) -> None:
        """Takes over the tensors: they must be nobody else's."""
        self.session_state = dict(session_state)
        self._parameters = dict(parameters)
        self._optimizer = dict(optimizer)

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        return ((name, to_host(tensor)) for name, tensor in self._parameters.items())

    def optimizer(self) -> Iterator[tuple[str, HostTensor]]:
        return ((name, to_host(tensor)) for name, tensor in self._optimizer.items())

    def parameter_specs(self) -> Specs:
        return _specs(self._parameters)

    def optimizer_specs(self) -> Specs:
        return _specs(self._optimizer)

    def close(self) -> None:
        self._parameters.clear()
        self._optimizer.clear()


def _specs(tensors: Mapping[str, Tensor]) -> Specs:
    return [(name, TAGS[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def load_parameters(masters: Masters | Mapping[str, Tensor], source: TensorSource) -> None:
    """Copy every parameter of `source` into `masters`, widened or rounded to their dtype.

    Raises:
        IntegrityError: names the missing, unexpected and misshapen ones. Nothing is taken when
            names differ; after a wrong shape the masters are a mixture and must not be used.
    """
    if not isinstance(masters, Masters):
        masters = Masters(masters)
    names, shapes = set(source.names()), {name: shape for name, _, shape in masters.specs()}
    problems = [f"missing {name}" for name in shapes if name not in names]
    problems += [f"unexpected {name}" for name in sorted(names - set(shapes))]
    if not problems:
        taken = (_take(masters, name, shape, source) for name, shape in shapes.items())
        problems = [problem for problem in taken if problem]
    if problems:
        raise IntegrityError(
            f"the parameters do not fit this model: {'; '.join(problems[:20])}",
            why=f"{len(problems)} of {len(shapes)} tensors differ from its name table",
            fix="use the configuration that the weights were saved with",
        )


def _take(masters: Masters, name: str, shape: tuple[int, ...], source: TensorSource) -> str:
    host = source.read(name)
    if host.dtype not in ("F32", "F16", "BF16"):
        return f"{name} is {host.dtype}, not a floating-point tensor"
    if tuple(host.shape) != shape:
        return f"misshapen {name}: {list(host.shape)} instead of {list(shape)}"
    masters.write(name, from_host(host))
    return ""


def load_states(states: Mapping[str, Tensor], source: TensorSource, table: OptimizerTable) -> None:
    """Copy every optimizer state of `source` into `states`, which are named as on disk.

    Raises:
        IntegrityError: names what is missing, unexpected, or of another dtype or shape. Nothing is
            taken when names differ; after a wrong shape the states are a mixture.
    """
    names = set(source.names())
    problems = [f"missing {name}" for name in states if name not in names]
    problems += [f"unexpected {name}" for name in sorted(names - states.keys())]
    if not problems:
        problems = list(_read_states(states, source))
    if problems:
        shown = ", ".join(problems[:8]) + (", ..." if len(problems) > 8 else "")
        raise IntegrityError(
            f"the optimizer state does not fit: {len(problems)} tensors: {shown}",
            why=f"this session trains with {table.name}, {table.state_bits}-bit",
            fix="resume with the optimizer settings that the checkpoint was written with",
        )


def _read_states(states: Mapping[str, Tensor], source: TensorSource) -> Iterator[str]:
    for name, state in states.items():
        tensor, expected = source.read(name), (TAGS[state.dtype], tuple(state.shape))
        if (tensor.dtype, tuple(tensor.shape)) != expected:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            yield f"misshapen {name}: {found} instead of {expected[0]} {list(expected[1])}"
        else:
            state.copy_(from_host(tensor))
