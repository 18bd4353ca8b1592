"""The inputs of the blocks, kept from the forward to the backward pass: on the device or the host.

[M, T, C] per block is all that a recomputed block needs. Off the device they take two buffers there
instead of one per block; each leaves after its forward pass and comes back one block ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solollm_torch.lanes import Lanes, Mark

NUM_SLOTS = 2


class Residuals:
    """Put with `keep` from block 0 to the last, taken from the last to 0."""

    def __init__(self, lanes: Lanes, num_blocks: int, *, offload: bool) -> None:
        self._lanes, self._last, self._offload = lanes, num_blocks - 1, offload
        self._on_device: dict[int, Tensor] = {}
        self._host: dict[int, Tensor] = {}
        self._slots: list[Tensor] = []
        self._free: list[Mark] = [None] * NUM_SLOTS
        self._stored: dict[int, Mark] = {}
        self._loaded: dict[int, Mark] = {}
        self._like: Tensor | None = None

    def host_bytes(self) -> int:
        """Of the buffers on the host, which are made when first needed."""
        return sum(buffer.nbytes for buffer in self._host.values())

    def keep(self, index: int, x: Tensor) -> None:
        """Take block `index`'s input. The last block's is used next and stays where it is."""
        if not self._offload or index == self._last:
            self._on_device[index] = x
            return
        self._like = x[:0]
        source = _bytes_of(x)
        if index not in self._host or self._host[index].nbytes < source.nbytes:
            self._lanes.synchronize()  # the smaller buffer may be in use
            self._host[index] = self._lanes.host_buffer(source.nbytes)
        target = self._host[index][: source.nbytes]
        after = [self._lanes.mark(), self._loaded.get(index)]
        self._stored[index] = self._lanes.store(target, source, after)

    def prefetch(self, index: int, shape: torch.Size) -> None:
        """Begin to bring one back; nothing for those that are on the device."""
        if index < 0 or index in self._on_device:
            return
        slot, num_bytes = index % NUM_SLOTS, shape.numel() * self._item_bytes
        self._make_room(num_bytes)
        after = [self._stored[index], self._free[slot]]
        target = self._slots[slot][:num_bytes]
        self._loaded[index] = self._lanes.load(target, self._host[index][:num_bytes], after)

    def take(self, index: int, shape: torch.Size) -> Tensor:
        """[M, T, C]; valid until `done`."""
        if index in self._on_device:
            return self._on_device.pop(index)
        assert self._like is not None, "a block's input was kept before"
        self._lanes.wait(self._loaded[index])
        raw = self._slots[index % NUM_SLOTS][: shape.numel() * self._item_bytes]
        return raw.view(self._like.dtype).view(shape)

    def done(self, index: int) -> None:
        """What has been queued so far was the last use of block `index`'s input."""
        self._free[index % NUM_SLOTS] = self._lanes.mark()

    @property
    def _item_bytes(self) -> int:
        return 0 if self._like is None else self._like.element_size()

    def _make_room(self, num_bytes: int) -> None:
        if self._slots and self._slots[0].nbytes >= num_bytes:
            return
        self._slots = [self._lanes.device_buffer(num_bytes) for _ in range(NUM_SLOTS)]
        # Their memory may have been something else's, queued before: not to be written until then.
        self._free = [self._lanes.mark()] * NUM_SLOTS


def _bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
