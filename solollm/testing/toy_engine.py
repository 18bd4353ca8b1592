"""Generation with the toy model: every step computes each running request from its last tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
from solollm.errors import BackendError, ConfigError
from solollm.sampling import check_sampling, choose


@dataclass
class Running:
    """A request under way: the prompt and the tokens so far."""

    id: int
    request: Request
    ids: list[int] = field(default_factory=list)
    scores: PromptScores | None = None


class ToyEngine(Engine):
    """Reads the arrays it is given, without a copy."""

    def __init__(
        self, model: ModelConfig, weights: Mapping[str, np.ndarray], options: EngineOptions
    ) -> None:
        self.model = model
        self.options = replace(
            options,
            max_seq_len=options.max_seq_len or model.max_position_embeddings,
            vocab_size=options.vocab_size or model.vocab_size,
        )
        self._weights = weights

    def open(self) -> ToyDecoder:
        return ToyDecoder(self)

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """float32 [V]: of the token after `ids`."""
        embedding = self._weights["model.embed_tokens.weight"]
        mixed = embedding[ids[-1]] + (embedding[ids[-2]] if len(ids) > 1 else 0)  # [C]
        head = self._weights.get("lm_head.weight", embedding)
        logits: np.ndarray = head @ (mixed * self._weights["model.norm.weight"])
        shifted = logits - logits.max()
        result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
        if not np.isfinite(result).all():
            raise BackendError("the model gives no finite logits", why="its weights hold NaN")
        return result


class ToyDecoder(Decoder):
    """At most `max_batch_size` requests run; the others wait in order."""

    def __init__(self, engine: ToyEngine) -> None:
        self._engine = engine
        self.running: list[Running] = []
        self._waiting: list[Running] = []
        self._ended: list[TokenEvent] = []
        self._next_id = 0

    def add(self, request: Request) -> int:
        self._check(request)
        self._next_id += 1
        entry = Running(self._next_id, request, [int(token) for token in request.prompt_ids])
        if request.score_prompt:
            entry.scores = self._score(entry.ids)
        if request.max_new_tokens == 0:
            self._ended.append(TokenEvent(entry.id, -1, 0.0, "length", entry.scores))
        else:
            self._waiting.append(entry)
        return entry.id

    def step(self) -> list[TokenEvent]:
        events, self._ended = self._ended, []
        while self._waiting and len(self.running) < self._engine.options.max_batch_size:
            self.running.append(self._waiting.pop(0))
        for entry in list(self.running):
            events.append(self.advance(entry))
        return events

    def cancel(self, request_id: int) -> None:
        for queue in (self.running, self._waiting):
            for entry in list(queue):
                if entry.id == request_id:
                    queue.remove(entry)
                    self._ended.append(TokenEvent(request_id, -1, 0.0, "cancelled"))

    def advance(self, entry: Running) -> TokenEvent:
        """The next token of one request."""
        request, options = entry.request, self._engine.options
        logprobs = self._engine.logprobs(entry.ids)
        token = choose(
            logprobs, request.sampling, np.array(entry.ids),
            vocab_size=options.vocab_size, processors=request.logits_processors,
        )  # fmt: skip
        entry.ids.append(token)
        limit = min(len(request.prompt_ids) + request.max_new_tokens, options.max_seq_len + 1)
        reason: FinishReason | None = None
        if token in request.stop_ids:
            reason = "stop"
        elif len(entry.ids) == limit:
            reason = "length"
        if reason is not None:
            self.running.remove(entry)
        scores, entry.scores = entry.scores, None
        return TokenEvent(entry.id, token, float(logprobs[token]), reason, scores)

    def _score(self, ids: list[int]) -> PromptScores:
        rows = [self._engine.logprobs(ids[:end]) for end in range(1, len(ids))]
        picked = [row[token] for row, token in zip(rows, ids[1:], strict=True)]
        vocab_size = self._engine.options.vocab_size
        greedy = [row[:vocab_size].argmax() == t for row, t in zip(rows, ids[1:], strict=True)]
        return PromptScores(np.array(picked, np.float32), np.array(greedy, bool))

    def _check(self, request: Request) -> None:
        check_sampling(request.sampling)
        options, ids = self._engine.options, request.prompt_ids
        if request.adapter is not None:
            raise ConfigError(f"the toy engine holds no adapter {request.adapter!r}")
        if len(ids) == 0:
            raise ConfigError("the prompt is empty", fix="begin it with the tokenizer's bos id")
        if len(ids) > options.max_seq_len + (request.max_new_tokens == 0):
            raise ConfigError(
                f"a prompt of {len(ids)} tokens is too long",
                why=f"the engine holds {options.max_seq_len} positions",
                fix="shorten it",
            )
        if min(ids) < 0 or max(ids) >= options.vocab_size:
            raise ConfigError(
                f"a prompt id is outside the vocabulary of {options.vocab_size}",
                fix="use the tokenizer that belongs to the checkpoint",
            )
