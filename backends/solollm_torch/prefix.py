"""Which sequence sits in which slot of the cache, and what it need not compute again.

A slot keeps its tokens, scores and keys after its sequence has finished, until somebody else needs
the slot. A prompt that begins the same way as any slot, running or finished (the next turn of a
conversation, the four answers to one question, the examples before every question of a benchmark,
many samples of one prompt), takes that beginning over instead of computing it: at its place where
the slot is free, by a copy otherwise.

Memory is bounded by the number of slots. A new sequence takes the free slot of least use to those
that wait, and of these the one that was left longest ago. With more slots than sequences run at
once (`prefix_slots`), beginnings outlive the sequences that come after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from solollm_torch.kv_cache import KVCache

_WORTH_COPYING = 16  # positions in common that are copied rather than computed again
_WORTH_WAITING = 64
LOOKED_AHEAD = 32  # waiting prompts that are considered at once


class Prompt(NamedTuple):
    """Token ids, int64 [n], and the number of the adapter that reads them."""

    tokens: np.ndarray
    adapter: int


class SlotTable:
    """Per slot, on the host.

    Attributes:
        tokens: int64 [slots, max_seq_len + 1]; `num_tokens` [slots] of them are known.
        filled: [slots]; positions whose keys and values are in the cache.
        logprobs, is_greedy: [slots, max_seq_len + 1]; the score of each token but the first, for
            `num_scored` [slots] tokens; `is_scored` [slots]: the sequence there asks for scores.
        in_use: [slots]; a sequence is running there.
        left_at: [slots]; the larger, the later the slot was released; 0: never.
        adapter: [slots]; whose factors made these keys: another adapter's are other keys.
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
        self.left_at = np.zeros(slots, np.int64)
        self.adapter = np.zeros(slots, np.int64)

    def seat(
        self,
        prompt: Prompt,
        waiting: Sequence[Prompt],
        *,
        num_fed: int,
        is_scored: bool,
        is_patient: bool,
        cache: KVCache,
    ) -> int | None:
        """Take a slot for `prompt`, with what an earlier sequence computed of it already filled in.

        At least one of the first `num_fed` tokens is left to compute. None: every slot is in use,
        or another sequence is about to compute the same beginning and waiting for it is cheaper.
        `waiting`: the prompts that come next; what they can use is given up last, and not at all
        for an `is_patient` one, which nobody waits for to begin.
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
        slot = min(free.tolist(), key=lambda one: (self._wanted(one, waiting), self.left_at[one]))
        if shared and not self.in_use[best] and self._is_used_up(best, shared):
            slot = best
        elif is_patient and self.in_use.any() and self._wanted(slot, waiting) > shared:
            return None
        if slot != best and shared:
            cache.copy_prefix(best, slot, shared)
            self.logprobs[slot, : shared + 1] = self.logprobs[best, : shared + 1]
            self.is_greedy[slot, : shared + 1] = self.is_greedy[best, : shared + 1]
        self.tokens[slot, : len(prompt.tokens)] = prompt.tokens
        self.num_tokens[slot] = len(prompt.tokens)
        self.adapter[slot] = prompt.adapter
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
        self.left_at[slot] = self.left_at.max() + 1
        self.num_tokens[slot] = self.filled[slot]

    def _is_used_up(self, slot: int, shared: int) -> bool:
        """Whether little is lost when only `shared` positions of a free slot are kept: one more
        conversation with the same system prompt must not cost the first its history."""
        return int(self.filled[slot]) - shared <= max(_WORTH_WAITING, shared // 2)

    def _wanted(self, slot: int, waiting: Sequence[Prompt]) -> int:
        """How many positions of a slot the next prompts can take over, at most."""
        kept, adapter = self.tokens[slot, : self.filled[slot]], self.adapter[slot]
        alike = (other.tokens for other in waiting if other.adapter == adapter)
        longest = max((_num_common(kept, tokens) for tokens in alike), default=0)
        return longest if longest >= _WORTH_COPYING else 0

    def _common(self, prompt: Prompt) -> np.ndarray:
        """How many tokens each slot has in common with the beginning of `prompt`, made with the
        same adapter."""
        length = min(len(prompt.tokens), int(self.num_tokens.max()))
        differs = np.ones((len(self.tokens), length + 1), bool)  # the last column ends the search
        differs[:, :length] = self.tokens[:, :length] != prompt.tokens[:length]
        differs[:, 0] |= self.adapter != prompt.adapter
        common: np.ndarray = np.minimum(differs.argmax(axis=1), self.num_tokens)
        return common


def _num_common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
