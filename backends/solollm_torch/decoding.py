"""Requests under way: continuous batching over one KV cache.

Each step gives every running sequence one token, then reads up to `prefill_tokens` of the prompts
of those that came later, so that a long prompt never stops the others.

Shapes: N sequences or prompt tokens in a call, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solollm.backend import (
    Decoder,
    EngineOptions,
    FinishReason,
    PromptScores,
    Request,
    TokenEvent,
)
from solollm.engine_input import checked_prompt
from solollm.errors import BackendError
from solollm.sampling import choose, is_plain_greedy
from solollm_torch.inference import Chunk, Group, InferenceModel, Rows
from solollm_torch.kv_cache import KVCache
from solollm_torch.live_adapters import BASE_ALONE, Share
from solollm_torch.prefix import LOOKED_AHEAD, Prompt, SlotTable

_SCORED_ROWS = 128  # prompt positions whose full logits are held at once


@dataclass(eq=False)
class _Sequence:
    """A request under way. `limit`: tokens, prompt included, at which it ends; `adapter`: the
    number of its adapter."""

    id: int
    request: Request
    prompt: np.ndarray
    limit: int
    adapter: int
    slot: int = -1

    @property
    def num_fed(self) -> int:
        """Prompt tokens that must pass through the model: the last only if it is continued."""
        return len(self.prompt) - (self.request.max_new_tokens == 0)

    @property
    def key(self) -> Prompt:
        """What it may share with others."""
        return Prompt(self.prompt, self.adapter)


class _Pick(NamedTuple):
    token: int
    logprob: float


class TorchDecoder(Decoder):
    """The requests of one engine. Not to be used from two threads at once."""

    def __init__(
        self,
        model: InferenceModel,
        options: EngineOptions,
        *,
        prefill_tokens: int,
        prefix_slots: int = 0,
    ) -> None:
        """`prefill_tokens`: prompt tokens read per step. `prefix_slots`: see `prefix`."""
        self._model = model
        self._options = options
        self._limit = options.max_seq_len
        self._vocab_size = options.vocab_size
        self._prefill_tokens = prefill_tokens
        num_slots = options.max_batch_size + prefix_slots
        self._table = SlotTable(num_slots, options.max_seq_len)
        self._cache = KVCache(model.config, num_slots, options.max_seq_len, like=model.norm)
        self._next_id = 0
        self._waiting: deque[_Sequence] = deque()
        self._reading: list[_Sequence] = []  # seated, part of the prompt still to be read
        self._running: list[_Sequence] = []  # in the order of their slots
        self._ended: list[TokenEvent] = []  # ended without a step

    def add(self, request: Request) -> int:
        prompt = checked_prompt(request, self._options)
        self._next_id += 1
        limit = min(len(prompt) + request.max_new_tokens, self._limit + 1)
        adapters = self._model.adapters
        adapter = adapters.number(request.adapter) if adapters is not None else BASE_ALONE
        sequence = _Sequence(self._next_id, request, prompt, limit, adapter)
        if request.max_new_tokens == 0 and (len(prompt) == 1 or not request.score_prompt):
            self._ended.append(_scored(sequence, np.zeros(0, np.float32), np.zeros(0, bool)))
        else:
            self._waiting.append(sequence)
        return sequence.id

    def cancel(self, request_id: int) -> None:
        for queue in (self._waiting, self._reading, self._running):
            for sequence in [s for s in queue if s.id == request_id]:
                queue.remove(sequence)
                if sequence.slot >= 0:
                    self._table.release(sequence.slot)
                self._ended.append(TokenEvent(request_id, -1, 0.0, "cancelled"))

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        events, self._ended = self._ended, []
        if self._running:
            events += self._decode()
        self._take_seats()
        while self._reading:
            events += self._read_prompts()
            if events:
                break
        return events

    def _decode(self) -> list[TokenEvent]:
        """One token for every running sequence."""
        sequences, table, cache = list(self._running), self._table, self._cache
        slots = np.array([sequence.slot for sequence in sequences])
        positions = table.num_tokens[slots] - 1
        cache.reserve(int(positions.max()) + 1)
        input_ids = self._tensor(table.tokens[slots, positions])
        rows = self._rows(slots, positions)
        rows = rows._replace(shares=self._shares([s.adapter for s in sequences]))
        hidden = self._model.decode(input_ids, rows, cache)
        picks = self._choose(sequences, hidden)
        table.filled[slots] = positions + 1
        return [self._accept(s, pick) for s, pick in zip(sequences, picks, strict=True)]

    def _rows(self, slots: np.ndarray, positions: np.ndarray) -> Rows:
        """How these sequences attend: neighbouring slots together, over the longest of them."""
        places = self._tensor(positions)
        borders = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
        groups = []
        for first, last in pairwise(borders):
            lengths = positions[first:last] + 1
            longest, mask = int(lengths.max()), None
            if lengths.min() < longest:
                beyond = torch.arange(longest, device=places.device) > places[first:last, None]
                mask = self._model.norm.new_zeros(beyond.shape).masked_fill_(beyond, -math.inf)
                mask = mask[:, None, None]  # [n, 1, 1, longest]
            groups.append(Group(first, last, int(slots[first]), longest, mask))
        cache_rows = self._cache.write_rows(self._tensor(slots), places)
        return Rows(places, cache_rows, tuple(groups))

    def _shares(self, numbers: Sequence[int] | np.ndarray) -> tuple[Share, ...]:
        """The adapters of rows with these numbers."""
        adapters = self._model.adapters
        return adapters.shares(np.asarray(numbers)) if adapters is not None else ()

    def _take_seats(self) -> None:
        """Slots for waiting requests, in order except for those that gain by waiting."""
        passed: list[_Sequence] = []
        while self._waiting and len(passed) < LOOKED_AHEAD:
            if self._table.in_use.sum() == self._options.max_batch_size:
                break
            sequence = self._waiting.popleft()
            later = islice(chain(passed, self._waiting), LOOKED_AHEAD)
            slot = self._table.seat(
                sequence.key, [other.key for other in later], num_fed=sequence.num_fed,
                is_scored=sequence.request.score_prompt,
                is_patient=sequence.request.max_new_tokens == 0, cache=self._cache,
            )  # fmt: skip
            if slot is None:
                passed.append(sequence)
            else:
                sequence.slot = slot
                self._reading.append(sequence)
        self._waiting.extendleft(reversed(passed))

    def _read_prompts(self) -> list[TokenEvent]:
        """Read the next prompt tokens; the first token of each sequence that is through."""
        table, budget = self._table, self._prefill_tokens
        readers: list[_Sequence] = []
        chunks: list[Chunk] = []
        for sequence in self._reading:
            # After a failed choice a whole prompt is already read: its last token is read again.
            start = min(int(table.filled[sequence.slot]), sequence.num_fed - 1)
            stop = min(sequence.num_fed, start + budget)
            readers.append(sequence)
            chunks.append(Chunk(sequence.slot, start, stop))
            budget -= stop - start
            if budget == 0:
                break
        self._cache.reserve(max(chunk.stop for chunk in chunks))
        input_ids = np.concatenate([table.tokens[slot, a:b] for slot, a, b in chunks])
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        shares = self._shares(np.repeat([s.adapter for s in readers], lengths))
        hidden = self._model.prefill(  # [N, C]
            self._tensor(input_ids), chunks, self._cache, shares
        )
        self._score(readers, chunks, hidden)
        through: list[tuple[_Sequence, int]] = []
        row = -1
        for sequence, chunk in zip(readers, chunks, strict=True):
            row += chunk.stop - chunk.start
            table.filled[chunk.slot] = chunk.stop
            if chunk.stop == sequence.num_fed:
                through.append((sequence, row))
        return self._start(through, hidden)

    def _start(self, through: Sequence[tuple[_Sequence, int]], hidden: Tensor) -> list[TokenEvent]:
        """End the sequences that only wanted scores, start the others with their first token."""
        starting = [(s, row) for s, row in through if s.request.max_new_tokens]
        sequences = [sequence for sequence, _ in starting]
        picks = self._choose(sequences, hidden[[row for _, row in starting]]) if starting else []
        for sequence, _ in through:
            self._reading.remove(sequence)
        self._running = sorted([*self._running, *sequences], key=lambda s: s.slot)
        events = []
        for sequence, _ in through:
            if not sequence.request.max_new_tokens:
                events.append(self._scored(sequence))
                self._table.release(sequence.slot)
        for sequence, pick in zip(sequences, picks, strict=True):
            scores = self._scored(sequence).prompt_scores
            events.append(self._accept(sequence, pick)._replace(prompt_scores=scores))
        return events

    def _choose(self, sequences: Sequence[_Sequence], hidden: Tensor) -> list[_Pick]:
        """The next token of each sequence from its hidden state [N, C]. Changes nothing, so that a
        logits processor that raises leaves the decoder as it was."""
        logits = self._model.logits(hidden)  # float32 [N, V]
        logprobs = logits.log_softmax(-1)
        best, tokens = logprobs[:, : self._vocab_size].max(-1)
        picks = [_Pick(*pair) for pair in zip(tokens.tolist(), best.tolist(), strict=True)]
        for row, sequence in enumerate(sequences):
            request = sequence.request
            if not math.isfinite(picks[row].logprob):
                raise BackendError(
                    "the model gives no finite logits",
                    why="its weights hold NaN or infinity",
                    fix="go back to a checkpoint from before training diverged",
                )
            if not is_plain_greedy(request.sampling, request.logits_processors):
                token = choose(
                    logits[row].cpu().numpy(), request.sampling, self._history(sequence),
                    vocab_size=self._vocab_size, processors=request.logits_processors,
                )  # fmt: skip
                picks[row] = _Pick(token, float(logprobs[row, token]))
        return picks

    def _accept(self, sequence: _Sequence, pick: _Pick) -> TokenEvent:
        table, slot = self._table, sequence.slot
        table.append(slot, pick.token)
        reason: FinishReason | None = None
        if pick.token in sequence.request.stop_ids:
            reason = "stop"
        elif table.num_tokens[slot] == sequence.limit:
            reason = "length"
        if reason is not None:
            self._running.remove(sequence)
            table.release(slot)
        return TokenEvent(sequence.id, pick.token, pick.logprob, reason)

    def _score(self, readers: Sequence[_Sequence], chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Write down the log-probability of each prompt token that follows one just read."""
        table = self._table
        rows: list[np.ndarray] = []  # of `hidden`
        slots: list[np.ndarray] = []
        places: list[np.ndarray] = []  # of the scored token in its sequence
        row = 0
        for sequence, (slot, start, stop) in zip(readers, chunks, strict=True):
            count = min(stop, len(sequence.prompt) - 1) - start
            if sequence.request.score_prompt and count > 0:
                rows.append(np.arange(row, row + count))
                slots.append(np.full(count, slot))
                places.append(np.arange(start + 1, start + 1 + count))
                table.num_scored[slot] = start + count + 1
            row += stop - start
        if not rows:
            return
        row_of, slot_of, place = (np.concatenate(part) for part in (rows, slots, places))
        for first in range(0, len(row_of), _SCORED_ROWS):
            part = slice(first, first + _SCORED_ROWS)
            at = (slot_of[part], place[part])
            targets = self._tensor(table.tokens[at])
            logprobs = self._model.logits(hidden[self._tensor(row_of[part])]).log_softmax(-1)
            greedy = logprobs[:, : self._vocab_size].argmax(-1) == targets
            table.logprobs[at] = logprobs.gather(1, targets[:, None])[:, 0].cpu().numpy()
            table.is_greedy[at] = greedy.cpu().numpy()

    def _scored(self, sequence: _Sequence) -> TokenEvent:
        span = (sequence.slot, slice(1, len(sequence.prompt)))
        return _scored(
            sequence, self._table.logprobs[span].copy(), self._table.is_greedy[span].copy()
        )

    def _history(self, sequence: _Sequence) -> np.ndarray:
        """The prompt and the tokens so far."""
        tokens: np.ndarray = self._table.tokens[sequence.slot]
        return tokens[: self._table.num_tokens[sequence.slot]]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._model.device)


def _scored(sequence: _Sequence, logprobs: np.ndarray, is_greedy: np.ndarray) -> TokenEvent:
    """The event of a request that ends with its prompt; carries scores if it asked for them."""
    scores = PromptScores(logprobs, is_greedy) if sequence.request.score_prompt else None
    return TokenEvent(sequence.id, -1, 0.0, "length", scores)
