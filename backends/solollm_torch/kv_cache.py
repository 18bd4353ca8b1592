"""The keys and values of sequences being decoded: device memory. Who holds which slot, and what two
sequences share, is in `prefix`.

Shapes: L layers, K key/value heads, D head size, S capacity in positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solollm.architecture import ModelConfig

_FIRST_CAPACITY = 256


def capacity_for(length: int, max_seq_len: int) -> int:
    """Positions that a slot has once `length` of them were asked for."""
    capacity = _FIRST_CAPACITY
    while capacity < length:
        capacity *= 2
    return min(capacity, max_seq_len)


class KVCache:
    """One tensor [L, slots, 2 K, S, D]: the K keys of a slot, then its K values.

    S grows by doubling up to `max_seq_len`, so that a short chat never pays for a long context.
    """

    def __init__(self, config: ModelConfig, slots: int, max_seq_len: int, like: Tensor) -> None:
        self.max_seq_len = max_seq_len
        capacity = capacity_for(1, max_seq_len)
        shape = (config.num_hidden_layers, slots, 2 * config.num_key_value_heads)
        # Zeros, not empty: masked positions are multiplied by zero, and zero times NaN is NaN.
        self.data = like.new_zeros((*shape, capacity, config.head_dim))

    @property
    def capacity(self) -> int:
        return self.data.shape[3]

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in every slot."""
        if length <= self.capacity:
            return
        capacity = capacity_for(length, self.max_seq_len)
        layers, slots, heads, filled, dim = self.data.shape
        grown = self.data.new_zeros(layers, slots, heads, capacity, dim)
        grown[:, :, :, :filled] = self.data
        self.data = grown

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source`."""
        self.data[:, target, :, :length] = self.data[:, source, :, :length]

    def write_rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where keys and values of one new position per slot go: int64 [N * 2 K], indices into a
        layer seen as [slots * 2 K * S, D]."""
        heads = torch.arange(self.data.shape[2], device=self.data.device)
        rows = (slots[:, None] * len(heads) + heads) * self.capacity + positions[:, None]
        return rows.flatten()
