"""Requests under way: mlx-lm's continuous batching behind the seam's Decoder.

mlx-lm's calls are in `mlx_lm_adapter`, the choice of a token in `solollm.sampling`. The greedy
choice stays on the device, so that a step is computed while the one before is read; any other is
made on the host.

Shapes: N rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """A request under way. `left`: tokens it may still get; `host`: what picks them, None where
    the device does."""

    id: int
    request: Request
    prompt: np.ndarray
    left: int
    host: _HostSampler | None = None
    scores: PromptScores | None = None


class MlxDecoder(Decoder):
    """The requests of one engine. Not to be used from two threads at once.

    A logits processor that raises fails its own request: `step` raises its error until that request
    is cancelled, and no other request loses a token.
    """

    def __init__(self, module: nn.Module, options: EngineOptions, *, prefill_tokens: int) -> None:
        self._module, self._options = module, options
        self._generator = mlx_lm.Generator(
            module, max_batch_size=options.max_batch_size, prefill_tokens=prefill_tokens
        )
        self._greedy = _greedy(options.vocab_size)
        self._next_id = 0
        self._running: dict[int, _Sequence] = {}  # by the generator's uid
        self._to_score: list[_Sequence] = []
        self._failed: dict[int, Exception] = {}  # by request id
        self._events: list[TokenEvent] = []  # happened, not told yet

    def add(self, request: Request) -> int:
        prompt = checked_prompt(request, self._options)
        self._next_id += 1
        left = min(request.max_new_tokens, self._options.max_seq_len + 1 - len(prompt))
        sequence = _Sequence(self._next_id, request, prompt, left)
        if request.score_prompt or left == 0:
            self._to_score.append(sequence)
        else:
            self._start(sequence)
        return sequence.id

    def step(self) -> list[TokenEvent]:
        if not self._failed:
            self._score_prompts()
            for generated in self._generator.step():
                if generated.uid in self._running:
                    self._events.append(self._accept(generated))
            self._take_out_failed()
        if self._failed:
            raise next(iter(self._failed.values()))
        events, self._events = self._events, []
        return events

    def cancel(self, request_id: int) -> None:
        if self._failed.pop(request_id, None) is not None:
            self._events.append(TokenEvent(request_id, -1, 0.0, "cancelled"))
            return
        for uid, sequence in self._running.items():
            if sequence.id == request_id:
                self._generator.remove(uid)
                del self._running[uid]
                self._events.append(TokenEvent(request_id, -1, 0.0, "cancelled"))
                return
        for sequence in self._to_score:
            if sequence.id == request_id:
                self._to_score.remove(sequence)
                self._events.append(TokenEvent(request_id, -1, 0.0, "cancelled"))
                return

    def _start(self, sequence: _Sequence) -> None:
        request = sequence.request
        sampler, watcher = self._greedy, None
        if not is_plain_greedy(request.sampling, request.logits_processors):
            sequence.host = _HostSampler(sequence, self._options.vocab_size)
            sampler, watcher = sequence.host.pick, sequence.host.watch
        uid = self._generator.insert(
            sequence.prompt.tolist(), max_tokens=sequence.left, sampler=sampler, watcher=watcher
        )
        self._running[uid] = sequence

    def _accept(self, generated: mlx_lm.Generated) -> TokenEvent:
        sequence = self._running[generated.uid]
        if not math.isfinite(generated.logprob):
            raise BackendError(
                "the model gives no finite logits",
                why="its weights hold NaN or infinity",
                fix="go back to a checkpoint from before training diverged",
            )
        sequence.left -= 1
        reason: FinishReason | None = None
        if generated.token in sequence.request.stop_ids:
            reason = "stop"
        elif sequence.left == 0:
            reason = "length"
        if reason is not None:
            del self._running[generated.uid]
            self._generator.remove(generated.uid)
        scores, sequence.scores = sequence.scores, None
        return TokenEvent(sequence.id, generated.token, generated.logprob, reason, scores)

    def _take_out_failed(self) -> None:
        for uid, sequence in list(self._running.items()):
            if sequence.host is not None and sequence.host.error is not None:
                self._failed[sequence.id] = sequence.host.error
                self._generator.remove(uid)
                del self._running[uid]

    def _score_prompts(self) -> None:
        """Score some of what waits for it; then start or end those requests."""
        size = self._options.max_batch_size
        rows, self._to_score = self._to_score[:size], self._to_score[size:]
        wanted = [sequence for sequence in rows if sequence.request.score_prompt]
        scores = self._score([sequence.prompt for sequence in wanted])
        for sequence, scored in zip(wanted, scores, strict=True):
            sequence.scores = scored
        for sequence in rows:
            if sequence.left:
                self._start(sequence)
            else:
                self._events.append(TokenEvent(sequence.id, -1, 0.0, "length", sequence.scores))

    def _score(self, prompts: Sequence[np.ndarray]) -> list[PromptScores]:
        """Log-probabilities of prompt tokens 1 to n - 1, and whether each was the argmax.

        Rows are padded on the right, which causal attention does not see.
        """
        if not prompts:
            return []
        longest = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), -(-longest // _SCORE_PADDING) * _SCORE_PADDING), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        hidden = mlx_lm.hidden_states(self._module, mx.array(ids))  # [N, T, C]
        targets = mx.array(np.roll(ids, -1, axis=1))
        scores, choices = np.zeros(ids.shape, np.float32), np.zeros(ids.shape, np.int32)
        for start in range(0, ids.shape[1], _SCORED_POSITIONS):
            part = slice(start, start + _SCORED_POSITIONS)
            logits = mlx_lm.logits_of(self._module, hidden[:, part])  # [N, t, V]
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
