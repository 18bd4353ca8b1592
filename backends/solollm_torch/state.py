"""Torch tensors to and from the bits that cross the seam, and the snapshot made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from solollm.backend import BITS_DTYPE, DType, HostTensor, Snapshot, TensorSource
from solollm.errors import IntegrityError

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


@torch.no_grad()
def load_parameters(masters: Mapping[str, Tensor], source: TensorSource) -> None:
    """Copy every parameter of `source` into `masters`, widened or rounded to their dtype.

    Raises:
        IntegrityError: names the missing, unexpected and misshapen ones. Nothing is taken when
            names differ; after a wrong shape the masters are a mixture and must not be used.
    """
    names = set(source.names())
    problems = [f"missing {name}" for name in masters if name not in names]
    problems += [f"unexpected {name}" for name in sorted(names - set(masters))]
    if not problems:
        problems = [p for name, master in masters.items() if (p := _take(master, name, source))]
    if problems:
        raise IntegrityError(
            f"the parameters do not fit this model: {'; '.join(problems[:20])}",
            why=f"{len(problems)} of {len(masters)} tensors differ from its name table",
            fix="use the configuration that the weights were saved with",
        )


def _take(master: Tensor, name: str, source: TensorSource) -> str:
    host = source.read(name)
    if host.dtype not in ("F32", "F16", "BF16"):
        return f"{name} is {host.dtype}, not a floating-point tensor"
    if tuple(host.shape) != tuple(master.shape):
        return f"misshapen {name}: {list(host.shape)} instead of {list(master.shape)}"
    master.copy_(from_host(host))
    return ""
