"""Two or more slots on the device through which the blocks' weights pass.

Block l always comes to slot l modulo their number: forward and backward then need no bookkeeping of
who is where, and autograd meets the parameter object again that it saw in the forward pass. While
one block is computed with, the next is on its way; at the turning points of a step the blocks that
are still in their slots are not loaded again.
"""

from __future__ import annotations

import torch

from solollm.architecture import ModelConfig
from solollm_torch.host_state import HostState
from solollm_torch.lanes import Lanes, Mark
from solollm_torch.layout import block_over
from solollm_torch.model import Block


class WeightRing:
    """The slots. `blocks` are the modules over them."""

    def __init__(
        self,
        model: ModelConfig,
        host: HostState,
        lanes: Lanes,
        *,
        num_slots: int,
        gradient_dtype: torch.dtype,
    ) -> None:
        self._host, self._lanes, self._num_blocks = host, lanes, model.num_hidden_layers
        self.num_slots = min(num_slots, model.num_hidden_layers)
        layout = host.layout
        self.buffers = [lanes.device_buffer(layout.weight_bytes) for _ in range(self.num_slots)]
        self.blocks = [block_over(model, layout.weights.views(b)) for b in self.buffers]
        for block in self.blocks:
            for parameter in block.parameters():
                parameter.grad_dtype = gradient_dtype
        self._holds: list[int | None] = [None] * self.num_slots
        self._ready: list[Mark] = [None] * self.num_slots
        self._free: list[list[Mark]] = [[] for _ in range(self.num_slots)]
        self._stored: dict[int, Mark] = {}

    def prefetch(self, index: int) -> None:
        """Begin to load a block into its slot, unless it is there; nothing for an index outside."""
        slot = index % self.num_slots
        if not 0 <= index < self._num_blocks or self._holds[slot] == index:
            return
        after = [*self._free[slot], self._stored.get(index)]
        source = self._host.block_weights[index]
        self._ready[slot] = self._lanes.load(self.buffers[slot], source, after)
        self._holds[slot] = index

    def use(self, index: int) -> Block:
        """The block, ready to compute with, until `release` or `write_back`."""
        self.prefetch(index)
        slot = index % self.num_slots
        self._lanes.wait(self._ready[slot])
        return self.blocks[slot]

    def release(self, index: int) -> None:
        """What has been queued so far was the last use of the block's weights for now."""
        self._free[index % self.num_slots] = [self._lanes.mark(), self._stored.get(index)]

    def write_back(self, index: int) -> None:
        """Store the weights in the block's slot, changed by what has been queued so far."""
        source, target = self.buffers[index % self.num_slots], self._host.block_weights[index]
        self._stored[index] = self._lanes.store(target, source, [self._lanes.mark()])
        self.release(index)

    def forget(self) -> None:
        """The host's weights have been written to: nothing that is loaded counts."""
        self._holds = [None] * self.num_slots
