"""What is written once above every engine, against a fake engine that follows a fixed rule."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest

from solollm.architecture import ModelConfig
from solollm.backend import (
    Decoder,
    Engine,
    EngineOptions,
    PromptScores,
    Request,
    TokenEvent,
)
from solollm.errors import ConfigError
from solollm.generation import Completion, generate, loglikelihood, stream, stream_from

LOG_HALF = math.log(0.5)


class CountingEngine(Engine):
    """Continues n by n + 1 (modulo the vocabulary) with probability 1/2; any other token has 1/4.

    `max_batch_size` requests at once; every prompt it was given is kept in `prompts`.
    """

    def __init__(self, model: ModelConfig, options: EngineOptions) -> None:
        self.model, self.options = model, options
        self.prompts: list[tuple[int, ...]] = []

    def open(self) -> CountingDecoder:
        return CountingDecoder(self)


class CountingDecoder(Decoder):
    def __init__(self, engine: CountingEngine) -> None:
        self.engine = engine
        self.queue: deque[tuple[int, Request, list[int]]] = deque()
        self.cancelled: list[int] = []
        self.num_added = 0

    def add(self, request: Request) -> int:
        if not request.prompt_ids:
            raise ConfigError("the prompt is empty")
        self.num_added += 1
        self.engine.prompts.append(tuple(request.prompt_ids))
        self.queue.append((self.num_added * 10, request, list(request.prompt_ids)))
        return self.num_added * 10

    def cancel(self, request_id: int) -> None:
        if any(entry[0] == request_id for entry in self.queue):
            self.queue = deque(entry for entry in self.queue if entry[0] != request_id)
            self.cancelled.append(request_id)

    def step(self) -> list[TokenEvent]:
        events = [TokenEvent(i, -1, 0.0, "cancelled") for i in self.cancelled]
        self.cancelled = []
        active = [self.queue.popleft() for _ in range(min(2, len(self.queue)))]
        for request_id, request, ids in reversed(active):
            event = self._advance(request_id, request, ids)
            events.append(event)
            if event.finish_reason is None:
                self.queue.appendleft((request_id, request, ids))
        return events

    def _advance(self, request_id: int, request: Request, ids: list[int]) -> TokenEvent:
        scores = None
        if request.score_prompt and len(ids) == len(request.prompt_ids):
            is_greedy = np.diff(ids) % self.engine.model.vocab_size == 1
            values = np.where(is_greedy, LOG_HALF, 2 * LOG_HALF).astype(np.float32)
            scores = PromptScores(values, is_greedy)
        if request.max_new_tokens == 0:
            return TokenEvent(request_id, -1, 0.0, "length", scores)
        token = (ids[-1] + 1) % self.engine.model.vocab_size
        ids.append(token)
        is_last = len(ids) == len(request.prompt_ids) + request.max_new_tokens
        reason = "stop" if token in request.stop_ids else "length" if is_last else None
        return TokenEvent(request_id, token, LOG_HALF, reason, scores)  # type: ignore[arg-type]


@pytest.fixture
def engine(tiny_config: ModelConfig) -> CountingEngine:
    return CountingEngine(tiny_config, EngineOptions(max_batch_size=2, max_seq_len=8))


def test_completions_come_in_request_order(engine: CountingEngine) -> None:
    """Guards the mapping of request ids to results when requests end out of order."""
    requests = [Request([10], 5), Request([20], 1), Request([30], 3, stop_ids=frozenset([32]))]
    results = generate(engine, requests)
    assert [r.ids for r in results] == [(11, 12, 13, 14, 15), (21,), (31, 32)]
    assert [r.finish_reason for r in results] == ["length", "length", "stop"]
    assert [r.text_ids for r in results] == [(11, 12, 13, 14, 15), (21,), (31,)]
    assert results[2].logprobs == (LOG_HALF, LOG_HALF)


def test_a_request_without_new_tokens_is_an_empty_completion(engine: CountingEngine) -> None:
    """Guards the token -1 of an event that carries none."""
    (result,) = generate(engine, [Request([1, 2, 9], 0, score_prompt=True)])
    assert (result.ids, result.finish_reason) == ((), "length")
    assert result.prompt_scores is not None
    assert result.prompt_scores.is_greedy.tolist() == [True, False]
    assert generate(engine, []) == []


def test_a_bad_request_stops_before_any_work(engine: CountingEngine) -> None:
    """Guards half-done batches."""
    with pytest.raises(ConfigError, match="empty"):
        generate(engine, [Request([1], 2), Request([], 2)])


def test_stream_gives_tokens_one_by_one(engine: CountingEngine) -> None:
    """Guards streaming output: the events are those of `generate`."""
    events = list(stream(engine, Request([5], 3)))
    assert [event.token for event in events] == [6, 7, 8]
    assert [event.finish_reason for event in events] == [None, None, "length"]


def test_a_closed_stream_cancels_its_request(engine: CountingEngine) -> None:
    """Guards a chat whose answer is interrupted: the decoder must be empty for the next one."""
    decoder = engine.open()
    events = stream_from(decoder, Request([5], 100))
    next(events)
    events.close()
    assert decoder.step() == []
    assert [event.token for event in stream_from(decoder, Request([8], 1))] == [9]


def test_loglikelihood_sums_the_continuation_only(engine: CountingEngine) -> None:
    """Guards the border between context and continuation."""
    pairs = [([1, 2], [3, 4]), ([1, 9], [3]), ([1], [2, 9]), ([1, 2], [3, 4])]
    scores = loglikelihood(engine, pairs)
    expected = [(2 * LOG_HALF, True), (2 * LOG_HALF, False), (3 * LOG_HALF, False)]
    assert scores == [pytest.approx(e, abs=1e-6) for e in [*expected, expected[0]]]
    assert len(engine.prompts) == 3, "equal pairs are run once"


def test_loglikelihood_cuts_over_long_pairs_from_the_left(engine: CountingEngine) -> None:
    """Guards lm-eval's rule: of context + continuation the last max_seq_len + 1 tokens are kept,
    also where the continuation alone fills the model."""
    (long,) = loglikelihood(engine, [(list(range(20)), [20, 21])])
    assert engine.prompts[-1] == tuple(range(13, 22))
    assert long == pytest.approx((2 * LOG_HALF, True))
    (full,) = loglikelihood(engine, [([1, 2, 3], list(range(4, 12)))])
    assert engine.prompts[-1] == tuple(range(3, 12))
    assert full == pytest.approx((8 * LOG_HALF, True))


@pytest.mark.parametrize(
    ("pair", "message"),
    [(([], [1]), "empty context"), (([1], []), "empty continuation"),
     (([1], list(range(9))), "exceeds the model's 8")],
)  # fmt: skip
def test_pairs_that_cannot_be_scored_are_refused(
    engine: CountingEngine, pair: tuple[list[int], list[int]], message: str
) -> None:
    """Guards a silent score of something else than what was asked."""
    with pytest.raises(ConfigError, match=message):
        loglikelihood(engine, [pair])


def test_text_ids_keep_everything_unless_stopped() -> None:
    """Guards the last word of an answer that ran out of tokens."""
    assert Completion((1, 2), (0.0, 0.0), "length").text_ids == (1, 2)
    assert Completion((1, 2), (0.0, 0.0), "cancelled").text_ids == (1, 2)
