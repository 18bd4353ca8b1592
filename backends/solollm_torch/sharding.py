"""The decoder spread over ranks by PyTorch's FSDP2, and which rows of each tensor a rank holds.

Every parameter is cut into as many stretches of rows as there are ranks; a block is put together
when it computes and taken apart afterwards. The stored matrices are fused, so a rank's rows of a
canonical tensor are what its stretch and the tensor's place in the matrix have in common: a view of
the shard, as everywhere. What trains on it is `sharded_session`, what is saved `sharded_state`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from solollm_torch.model import Decoder


class Part(NamedTuple):
    """A tensor of `shape`, of which each rank r holds the rows `rows[r]`, start to stop. In this
    rank's shard of the stored parameter they begin at row `offset`."""

    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    rank: int
    offset: int

    @property
    def own_rows(self) -> slice:
        return slice(*self.rows[self.rank])

    @property
    def own_shape(self) -> tuple[int, ...]:
        start, stop = self.rows[self.rank]
        return (stop - start, *self.shape[1:])

    @property
    def first_element(self) -> int:
        """Of this rank's rows, counted in the whole tensor."""
        return self.rows[self.rank][0] * math.prod(self.shape[1:])

    def of(self, shard: Tensor) -> Tensor:
        """This rank's rows, as a view of the shard of the stored parameter."""
        return shard.narrow(0, self.offset, self.own_shape[0])


def shard(decoder: Decoder, device: torch.device, *, offload: bool) -> None:
    """Spread the parameters of a decoder that was built on the meta device over all ranks of the
    process group, to be computed with on `device`. They hold no values yet.

    With `offload` the shards, their gradients and so the optimizer stay in host memory. Only
    pinning knows the device here, and the name of the group's backend (`ranks.join`).
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    computes_as_stored = decoder.compute_dtype == decoder.embed_tokens.dtype
    precision = MixedPrecisionPolicy(
        param_dtype=None if computes_as_stored else decoder.compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary table stays fp32
    )
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for module in modules_of(decoder):
        unit = fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=place)
        # The loss is a sum over all ranks divided by the core's denominator: no mean of means.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    decoder.to_empty(device="cpu" if offload else device)


def modules_of(decoder: Decoder) -> list[nn.Module]:
    """What is put together at once: each block, and last what is not in one."""
    return [*decoder.layers, decoder]


def spread(module: nn.Module) -> FSDPModule:
    """A module of a sharded decoder, with FSDP's methods."""
    return cast(FSDPModule, module)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard itself of a sharded parameter or gradient."""
    assert isinstance(tensor, DTensor), "the decoder is sharded"
    return tensor.to_local()


def parts_of(decoder: Decoder, rank: int, world_size: int) -> dict[str, Part]:
    """Canonical name -> who holds which rows of it, in table order."""
    # Where each canonical tensor lies in its parameter: its view of the parameter's row numbers.
    numbered = decoder.canonical_views(lambda parameter: torch.arange(parameter.shape[0]))
    parts = {}
    for name, parameter in stored_parameters(decoder).items():
        first, count = int(numbered[name][0]), len(numbered[name])
        stretches = [_stretch(parameter.shape[0], r, world_size) for r in range(world_size)]
        rows = tuple(
            (min(max(start - first, 0), count), min(max(stop - first, 0), count))
            for start, stop in stretches
        )
        is_empty = rows[rank][0] == rows[rank][1]
        offset = 0 if is_empty else max(first - stretches[rank][0], 0)
        parts[name] = Part((count, *parameter.shape[1:]), rows, rank, offset)
    return parts


def stored_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Canonical name -> the stored parameter that it is a part of."""
    stored = list(decoder.parameters())
    number = {id(parameter): i for i, parameter in enumerate(stored)}
    views = decoder.canonical_views(lambda p: torch.full((p.shape[0],), number[id(p)]))
    return {name: stored[int(view[0])] for name, view in views.items()}


def _stretch(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows of a parameter that FSDP2 gives to a rank: `torch.chunk`'s."""
    size = -(-num_rows // world_size)
    return min(rank * size, num_rows), min((rank + 1) * size, num_rows)
