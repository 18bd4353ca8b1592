"""The keys and values of sequences being decoded, and what is known of each slot's tokens.

`KVCache` is device memory, `SlotTable` its bookkeeping on the host. A slot keeps its tokens, scores
and keys after its sequence has finished, until somebody else needs the slot: a prompt that begins
the same way (the next turn of a conversation, the four answers to one question, many samples of one
prompt) copies them instead of computing them.

Shapes: L layers, K key/value heads, D head size, S capacity in positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from solollm.architecture import ModelConfig

_FIRST_CAPACITY = 256
_WORTH_COPYING = 16  # positions in common that are copied rather than computed again
_WORTH_WAITING = 64


class KVCache:
    """One tensor [L, slots, 2 K, S, D]: the K keys of a slot, then its K values.

    S grows by doubling up to `max_seq_len`, so that a short chat never pays for a long context.
    """

    def __init__(self, config: ModelConfig, slots: int, max_seq_len: int, like: Tensor) -> None:
        self.max_seq_len = max_seq_len
        capacity = min(_FIRST_CAPACITY, max_seq_len)
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
        capacity = self.capacity
        while capacity < length:
            capacity *= 2
        layers, slots, heads, filled, dim = self.data.shape
        grown = self.data.new_zeros(layers, slots, heads, min(capacity, self.max_seq_len), dim)
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


class SlotTable:
    """Per slot, on the host.

    Attributes:
        tokens: int64 [slots, max_seq_len + 1]; `num_tokens` [slots] of them are known.
        filled: [slots]; positions whose keys and values are in the cache.
        logprobs, is_greedy: [slots, max_seq_len + 1]; the score of each token but the first, for
            `num_scored` [slots] tokens; `is_scored` [slots]: the sequence there asks for scores.
        in_use: [slots]; a sequence is running there.
    """

    def __init__(self, slots: int, max_seq_len: int) -> None:
        self.tokens = np.zeros((slots, max_seq_len + 1), np.int64)
        self.num_tokens = np.zeros(slots, np.int64)
        self.filled = np.zeros(slots, np.int64)
        self.logprobs = np.zeros((slots, max_seq_len + 1), np.float32)
        self.is_greedy = np.zeros((slots, max_seq_len + 1), bool)
        self.num_scored = np.zeros(slots, np.int64)
        self.is_scored = np.zeros(slots, bool)
        self.in_use = np.zeros(slots, bool)

    def seat(
        self, prompt: np.ndarray, *, num_fed: int, is_scored: bool, cache: KVCache
    ) -> int | None:
        """Take a slot for `prompt`, with what an earlier sequence computed of it already filled in.

        At least one of the first `num_fed` tokens is left to compute. None: every slot is in use,
        or another sequence is about to compute the same beginning and waiting for it is cheaper.
        """
        free = np.flatnonzero(~self.in_use)
        if not len(free):
            return None
        common = np.minimum(self._common(prompt), num_fed)  # [slots]
        usable = np.minimum(common, self.filled)
        expected = np.where(self.in_use, common, 0)
        if is_scored:
            usable = np.minimum(usable, self.num_scored)
            expected = np.where(self.is_scored, expected, 0)
        best = int(usable.argmax())
        if expected.max() - usable[best] >= _WORTH_WAITING:
            return None
        # The last common token is fed again: its output is what comes next.
        shared = int(usable[best]) - 1
        shared = shared if shared >= _WORTH_COPYING else 0
        slot = best if shared and not self.in_use[best] else int(free[self.filled[free].argmin()])
        if slot != best and shared:
            cache.copy_prefix(best, slot, shared)
            self.logprobs[slot, : shared + 1] = self.logprobs[best, : shared + 1]
            self.is_greedy[slot, : shared + 1] = self.is_greedy[best, : shared + 1]
        self.tokens[slot, : len(prompt)] = prompt
        self.num_tokens[slot] = len(prompt)
        self.filled[slot] = shared
        self.num_scored[slot] = shared + 1 if is_scored else 0
        self.is_scored[slot] = is_scored
        self.in_use[slot] = True
        return slot

    def append(self, slot: int, token: int) -> None:
        """Add one token, not yet in the cache."""
        self.tokens[slot, self.num_tokens[slot]] = token
        self.num_tokens[slot] += 1

    def release(self, slot: int) -> None:
        """The sequence has ended; its tokens stay for others to share."""
        self.in_use[slot] = False
        self.num_tokens[slot] = self.filled[slot]

    def _common(self, prompt: np.ndarray) -> np.ndarray:
        """How many tokens each slot has in common with the beginning of `prompt`."""
        length = min(len(prompt), int(self.num_tokens.max()))
        differs = np.ones((len(self.tokens), length + 1), bool)  # the last column ends the search
        differs[:, :length] = self.tokens[:, :length] != prompt[:length]
        common: np.ndarray = np.minimum(differs.argmax(axis=1), self.num_tokens)
        return common
