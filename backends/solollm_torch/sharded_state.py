"""What crosses the seam of a sharded session: read, and streamed, one tensor at a time.

Nobody ever holds the whole model for it. Reading, each rank takes its own rows of every tensor.
Saving, rank 0 puts one tensor together from the rows of all, hands it out, and goes on to the next.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from solollm.backend import ITEM_BYTES, DType, HostTensor, Snapshot, TensorSource
from solollm.errors import IntegrityError
from solollm_torch.ranks import lost_ranks_named
from solollm_torch.sharding import Part
from solollm_torch.state import TORCH_DTYPES, Specs, to_host

_END = -1


class OwnRows:
    """A `TensorSource` of whole tensors as one of this rank's rows of them."""

    def __init__(self, source: TensorSource, parts: Mapping[str, Part]) -> None:
        """`parts`: of every tensor that is read."""
        self._source, self._parts = source, parts

    def names(self) -> Sequence[str]:
        return self._source.names()

    def read(self, name: str) -> HostTensor:
        """Raises IntegrityError for a tensor of another shape than its part's."""
        whole, part = self._source.read(name), self._parts[name]
        if tuple(whole.shape) != part.shape:
            raise IntegrityError(
                f"{name} does not fit: misshapen, {list(whole.shape)} instead of"
                f" {list(part.shape)}",
                fix="use the configuration that it was saved with",
            )
        rows = whole.data[part.own_rows]
        return HostTensor(whole.dtype, tuple(rows.shape), rows)


class Streamed(NamedTuple):
    """A tensor to be saved; `write` puts this rank's rows of it into a tensor on the host."""

    name: str
    dtype: DType
    part: Part
    write: Callable[[Tensor], object]


class ShardedSnapshot(Snapshot):
    """The state as it is while nobody trains: a view of the session's memory.

    On rank 0 each tensor is gathered when it is asked for, into the memory of the one before; the
    other ranks attend meanwhile. Where training goes on before all has been read, what is left is
    copied first (`preserve`).
    """

    is_live = True

    def __init__(
        self,
        parameters: Sequence[Streamed],
        optimizer: Sequence[Streamed],
        session_state: Mapping[str, int | float],
        group: dist.ProcessGroup,
    ) -> None:
        self.session_state = dict(session_state)
        self._num_parameters = len(parameters)
        self._tensors = [*parameters, *optimizer]
        self._read: set[int] = set()
        self._group = group
        self._buffer: Tensor | None = None
        self._lock = threading.Lock()

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        return map(self._whole, range(self._num_parameters))

    def optimizer(self) -> Iterator[tuple[str, HostTensor]]:
        return map(self._whole, range(self._num_parameters, len(self._tensors)))

    def parameter_specs(self) -> Specs:
        return [(t.name, t.dtype, t.part.shape) for t in self._tensors[: self._num_parameters]]

    def optimizer_specs(self) -> Specs:
        return [(t.name, t.dtype, t.part.shape) for t in self._tensors[self._num_parameters :]]

    def attend(self) -> None:
        assert dist.get_rank(self._group) > 0, "rank 0 streams"
        index = torch.zeros((), dtype=torch.int64)
        with lost_ranks_named():
            while True:
                dist.broadcast(index, 0, group=self._group)
                if int(index) == _END:
                    return
                tensor = self._tensors[int(index)]
                rows = self._room(tensor)[: tensor.part.own_shape[0]]
                tensor.write(rows)
                if rows.numel():
                    dist.send(_bits(rows), 0, group=self._group)

    def preserve(self) -> None:
        """Copy what nobody has read yet: the state is about to change."""
        for index in range(len(self._tensors)):
            with self._lock:
                if index < len(self._tensors) and index not in self._read:
                    copied = self._own_rows(index)
                    write = functools.partial(torch.Tensor.copy_, other=copied)
                    self._tensors[index] = self._tensors[index]._replace(write=write)

    def close(self) -> None:
        was_open = bool(self._tensors)
        with self._lock:
            self._tensors, self._buffer = [], None
        leads = dist.get_rank(self._group) == 0
        if was_open and leads and dist.get_world_size(self._group) > 1:
            with lost_ranks_named():
                dist.broadcast(torch.tensor(_END), 0, group=self._group)

    def _room(self, tensor: Streamed) -> Tensor:
        """Memory for a whole tensor: the same for each, of the size of the largest."""
        if self._buffer is None:
            largest = max(_num_bytes(t) for t in self._tensors)
            self._buffer = torch.empty(largest, dtype=torch.uint8)
        room = self._buffer[: _num_bytes(tensor)]
        return room.view(TORCH_DTYPES[tensor.dtype]).view(tensor.part.shape)

    def _own_rows(self, index: int) -> Tensor:
        """A new tensor on the host."""
        tensor = self._tensors[index]
        rows = torch.empty(tensor.part.own_shape, dtype=TORCH_DTYPES[tensor.dtype])
        tensor.write(rows)
        return rows

    def _whole(self, index: int) -> tuple[str, HostTensor]:
        tensor = self._tensors[index]
        whole = self._room(tensor)
        with lost_ranks_named():
            if dist.get_world_size(self._group) > 1:
                dist.broadcast(torch.tensor(index), 0, group=self._group)
            with self._lock:
                self._read.add(index)
                self._tensors[index].write(whole[tensor.part.own_rows])
            for rank, (start, stop) in enumerate(tensor.part.rows):
                if rank != tensor.part.rank and start < stop:
                    dist.recv(_bits(whole[start:stop]), rank, group=self._group)
        return tensor.name, to_host(whole)


def _num_bytes(tensor: Streamed) -> int:
    return math.prod(tensor.part.shape) * ITEM_BYTES[tensor.dtype]


def _bits(rows: Tensor) -> Tensor:
    """Contiguous rows as bytes: gloo does not know every dtype."""
    return rows.view(-1).view(torch.uint8)
