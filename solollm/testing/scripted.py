"""An engine without a model: what it scores and says is written down. Benchmarks are rehearsed with
it, since a score of 100% or of chance is then known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from solollm.architecture import ModelConfig
from solollm.backend import (
    Decoder,
    Engine,
    EngineOptions,
    FinishReason,
    PromptScores,
    Request,
    TokenEvent,
)
from solollm.engine_input import checked_prompt, complete_options

Score = Callable[[Sequence[int]], float]
Reply = Callable[[Sequence[int]], Sequence[int]]


class ScriptedEngine(Engine):
    """`score(ids)`: log p of a prompt's last token, the ones before it count as certain.
    `reply(ids)`: the ids that continue a prompt."""

    def __init__(
        self, model: ModelConfig, options: EngineOptions, score: Score, reply: Reply
    ) -> None:
        self.model = model
        self.options = complete_options(options, model, known=())
        self.score, self.reply = score, reply

    def open(self) -> ScriptedDecoder:
        return ScriptedDecoder(self)


class ScriptedDecoder(Decoder):
    """One token of every request per step."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self._running: dict[int, tuple[Request, list[int]]] = {}  # with the reply's rest
        self._ended: list[TokenEvent] = []
        self._next_id = 0

    def add(self, request: Request) -> int:
        checked_prompt(request, self._engine.options)
        self._next_id += 1
        if request.max_new_tokens:
            reply = list(self._engine.reply(request.prompt_ids))[: request.max_new_tokens]
            self._running[self._next_id] = (request, reply)
            return self._next_id
        count = len(request.prompt_ids) - 1
        logprobs = np.zeros(count, np.float32)
        logprobs[-1:] = self._engine.score(request.prompt_ids)
        scores = PromptScores(logprobs, logprobs == 0)
        self._ended.append(TokenEvent(self._next_id, -1, 0.0, "length", scores))
        return self._next_id

    def step(self) -> list[TokenEvent]:
        events, self._ended = self._ended, []
        for request_id, (request, rest) in list(self._running.items()):
            token = rest.pop(0)
            reason: FinishReason | None = None if rest else "length"
            if token in request.stop_ids:
                reason = "stop"
            events.append(TokenEvent(request_id, token, 0.0, reason))
            if reason:
                del self._running[request_id]
        return events

    def cancel(self, request_id: int) -> None:
        if self._running.pop(request_id, None) is not None:
            self._ended.append(TokenEvent(request_id, -1, 0.0, "cancelled"))
