"""Requests under way: mlx-lm's continuous batching behind the seam's Decoder.

mlx-lm's generator runs one model over its rows, so the requests of each adapter have a generator of
their own, over a model that shares the base's arrays; a step asks each of them in turn. Rows of
several adapters in one batch would need to know inside mlx-lm's layers which row is whose, and
mlx-lm reorders, splits and merges its batches where nobody can look.

mlx-lm's calls are in `mlx_lm_adapter`, the choice of a token in `solollm.sampling`. The greedy
choice stays on the device, so that a step is computed while the one before is read; any other is
made on the host.

Shapes: N rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

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
from solollm_mlx import mlx_lm_adapter as mlx_lm

_SCORE_PADDING = 32  # scored prompts are padded to a multiple, so that few shapes are met
_SCORED_POSITIONS = 128  # prompt positions of a row whose full logits are held at once


@dataclass(eq=False)
class _Sequence:
    """A request under way. `left`: tokens it may still get; `has_begun`: it got its first;
    `adapter`: whose model it runs on; `uid`: its number in that model's generator; `host`: what
    picks its tokens, None where the device does."""

    id: int
    request: Request
    prompt: np.ndarray
    left: int
    adapter: str | None
    has_begun: bool = False
    uid: int = -1
    host: _HostSampler | None = None
    scores: PromptScores | None = None


class MlxDecoder(Decoder):
    """The requests of one engine. Not to be used from two threads at once.

    A logits processor that raises fails its own request: `step` raises its error until that request
    is cancelled, and no other request loses a token.
    """

    def __init__(
        self,
        modules: Mapping[str | None, nn.Module],
        options: EngineOptions,
        *,
        prefill_tokens: int,
    ) -> None:
        """`modules`: by adapter; None: of requests that name none where there is no default."""
        self._modules, self._options = modules, options
        self._prefill_tokens = prefill_tokens
        self._generators: dict[str | None, mlx_lm.Generator] = {}  # made when first used
        self._greedy = _greedy(options.vocab_size)
        self._next_id = 0
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[tuple[str | None, int], _Sequence] = {}  # by adapter and uid
        self._to_score: list[_Sequence] = []
        self._failed: dict[int, Exception] = {}  # by request id
        self._events: list[TokenEvent] = []  # happened, not told yet

    def add(self, request: Request) -> int:
        prompt = checked_prompt(request, self._options)
        self._next_id += 1
        left = min(request.max_new_tokens, self._options.max_seq_len + 1 - len(prompt))
        adapter = request.adapter if request.adapter is not None else self._options.adapter
        sequence = _Sequence(self._next_id, request, prompt, left, adapter)
        if request.score_prompt or left == 0:
            self._to_score.append(sequence)
        else:
            self._waiting.append(sequence)
        return sequence.id

    def step(self) -> list[TokenEvent]:
        if not self._failed:
            self._score_prompts()
            while self._waiting and len(self._running) < self._options.max_batch_size:
                self._start(self._waiting.popleft())
            for adapter in dict.fromkeys(adapter for adapter, _ in self._running):
                self._advance(adapter)
            self._take_out_failed()
        if self._failed:
            raise next(iter(self._failed.values()))
        events, self._events = self._events, []
        return events

    def cancel(self, request_id: int) -> None:
        if self._failed.pop(request_id, None) is not None:
            self._events.append(TokenEvent(request_id, -1, 0.0, "cancelled"))
            return
        for sequence in self._running.values():
            if sequence.id == request_id:
                self._take_out(sequence)
                self._events.append(TokenEvent(request_id, -1, 0.0, "cancelled"))
                return
        for queue in (self._to_score, self._waiting):
            for sequence in queue:
                if sequence.id == request_id:
                    queue.remove(sequence)
                    self._events.append(TokenEvent(request_id, -1, 0.0, "cancelled"))
                    return

    def _start(self, sequence: _Sequence) -> None:
        request = sequence.request
        sampler, watcher = self._greedy, None
        if not is_plain_greedy(request.sampling, request.logits_processors):
            sequence.host = _HostSampler(sequence, self._options.vocab_size)
            sampler, watcher = sequence.host.pick, sequence.host.watch
        adapter = sequence.adapter
        if adapter not in self._generators:
            self._generators[adapter] = mlx_lm.Generator(
                self._modules[adapter], max_batch_size=self._options.max_batch_size,
                prefill_tokens=self._prefill_tokens,
            )  # fmt: skip
        sequence.uid = self._generators[adapter].insert(
            sequence.prompt.tolist(), max_tokens=sequence.left, sampler=sampler, watcher=watcher
        )
        self._running[adapter, sequence.uid] = sequence

    def _advance(self, adapter: str | None) -> None:
        """One token for each running request of an adapter."""
        running = [sequence for (of, _), sequence in self._running.items() if of == adapter]
        is_last = all(sequence.has_begun and sequence.left == 1 for sequence in running)
        for generated in self._generators[adapter].step(is_last=is_last):
            sequence = self._running.get((adapter, generated.uid))
            if sequence is not None:
                self._events.append(self._accept(sequence, generated))

    def _take_out(self, sequence: _Sequence) -> None:
        self._generators[sequence.adapter].remove(sequence.uid)
        del self._running[sequence.adapter, sequence.uid]

    def _accept(self, sequence: _Sequence, generated: mlx_lm.Generated) -> TokenEvent:
        if not math.isfinite(generated.logprob):
            raise BackendError(
                "the model gives no finite logits",
                why="its weights hold NaN or infinity",
                fix="go back to a checkpoint from before training diverged",
            )
        sequence.left -= 1
        sequence.has_begun = True
        reason: FinishReason | None = None
        if generated.token in sequence.request.stop_ids:
            reason = "stop"
        elif sequence.left == 0:
            reason = "length"
        if reason is not None:
            self._take_out(sequence)
        scores, sequence.scores = sequence.scores, None
        return TokenEvent(sequence.id, generated.token, generated.logprob, reason, scores)

    def _take_out_failed(self) -> None:
        for sequence in list(self._running.values()):
            if sequence.host is not None and sequence.host.error is not None:
                self._failed[sequence.id] = sequence.host.error
                self._take_out(sequence)

    def _score_prompts(self) -> None:
        """Score some of what waits for it; then start or end those requests."""
        size = self._options.max_batch_size
        rows, self._to_score = self._to_score[:size], self._to_score[size:]
        wanted = [sequence for sequence in rows if sequence.request.score_prompt]
        for adapter in dict.fromkeys(sequence.adapter for sequence in wanted):
            alike = [sequence for sequence in wanted if sequence.adapter == adapter]
            scores = self._score(self._modules[adapter], [s.prompt for s in alike])
            for sequence, scored in zip(alike, scores, strict=True):
                sequence.scores = scored
        for sequence in rows:
            if sequence.left:
                self._waiting.append(sequence)
            else:
                self._events.append(TokenEvent(sequence.id, -1, 0.0, "length", sequence.scores))

    def _score(self, module: nn.Module, prompts: Sequence[np.ndarray]) -> list[PromptScores]:
        """Log-probabilities of prompt tokens 1 to n - 1, and whether each was the argmax.

        Rows are padded on the right, which causal attention does not see.
        """
        longest = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), -(-longest // _SCORE_PADDING) * _SCORE_PADDING), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        hidden = mlx_lm.hidden_states(module, mx.array(ids))  # [N, T, C]
        targets = mx.array(np.roll(ids, -1, axis=1))
        scores, choices = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, np.int32)
        for start in range(0, ids.shape[1], _SCORED_POSITIONS):
            part = slice(start, start + _SCORED_POSITIONS)
            logits = mlx_lm.logits_of(module, hidden[:, part])  # [N, t, V]
            taken = mx.take_along_axis(logits, targets[:, part, None], axis=-1)[..., 0]
            scores[:, part] = np.array(taken - mx.logsumexp(logits, axis=-1))
            best = mx.argmax(logits[..., : self._options.vocab_size], axis=-1)
            choices[:, part] = np.array(best)
        return [
            PromptScores(scores[row, : len(p) - 1].copy(), choices[row, : len(p) - 1] == p[1:])
            for row, p in enumerate(prompts)
        ]


def _greedy(vocab_size: int) -> mlx_lm.Sampler:
    """The argmax below the padding ids; one function, so that a batch is sampled in one call."""

    def pick(logprobs: mx.array) -> mx.array:
        return mx.argmax(logprobs[:, :vocab_size], axis=-1)

    return pick


class _HostSampler:
    """The reference of sampling for one request.

    It made every token after the prompt itself, so it knows the history without asking; it needs
    the raw logits, because a repetition penalty depends on their sign. The generator runs one token
    ahead, so after the last token, or an error, it is asked once more and must not answer.
    """

    def __init__(self, sequence: _Sequence, vocab_size: int) -> None:
        self.error: Exception | None = None
        self._request, self._vocab_size = sequence.request, vocab_size
        self._history: list[int] = sequence.prompt.tolist()
        self._end = len(self._history) + sequence.left
        self._logits = mx.array(0.0)

    def watch(self, logits: mx.array) -> None:
        self._logits = logits

    def pick(self, _: mx.array) -> mx.array:
        return mx.array([self._choose()], mx.uint32)

    def _choose(self) -> int:
        if self.error is not None or len(self._history) == self._end:
            return 0
        try:
            token = choose(
                np.array(self._logits)[0], self._request.sampling, np.array(self._history),
                vocab_size=self._vocab_size, processors=self._request.logits_processors,
            )  # fmt: skip
        except Exception as error:  # not through mlx-lm, whose batch would be left half stepped
            self.error = error
            return 0
        self._history.append(token)
        if token in self._request.stop_ids:
            self._end = len(self._history)
        return token
