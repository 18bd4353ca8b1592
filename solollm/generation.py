"""Generating and scoring, written once on top of any backend's Engine.

`generate` and `stream` continue prompts; `loglikelihood` scores given continuations, as the
multiple-choice benchmarks need it. Everything here speaks token ids; text is `Tokenizer`'s. How a
token is picked is in `solollm.sampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from solollm.backend import (
    Decoder,
    Engine,
    FinishReason,
    PromptScores,
    Request,
    TokenEvent,
)
from solollm.errors import ConfigError


@dataclass(frozen=True)
class Completion:
    """What a request became.

    Attributes:
        ids: the new tokens; the last one is the stop id when `finish_reason` is "stop".
        logprobs: log p of each under the model itself (before temperature and the rest), in nats.
        prompt_scores: present when the request asked for `score_prompt`.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_scores: PromptScores | None = None

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The new tokens without the stop id."""
        return self.ids[:-1] if self.finish_reason == "stop" else self.ids


def generate(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Complete every request, as many at once as the engine holds; results in request order.

    Raises:
        ConfigError: a request that the engine cannot run (checked before any is run).
    """
    decoder = engine.open()
    order = {decoder.add(request): index for index, request in enumerate(requests)}
    events: list[list[TokenEvent]] = [[] for _ in requests]
    for event in drain(decoder):
        events[order[event.request_id]].append(event)
    return [completion(of_request) for of_request in events]


def stream(engine: Engine, request: Request) -> Generator[TokenEvent, None, None]:
    """The tokens of one request as they come."""
    return stream_from(engine.open(), request)


def stream_from(decoder: Decoder, request: Request) -> Generator[TokenEvent, None, None]:
    """`stream` on an open decoder that runs nothing else; closing the iterator cancels the request.

    A conversation keeps one decoder, so that the engine can reuse what it computed for the turns
    before.
    """
    request_id = decoder.add(request)
    try:
        yield from drain(decoder)
    finally:
        decoder.cancel(request_id)
        for _ in drain(decoder):  # takes the cancelled request out
            pass


def drain(decoder: Decoder) -> Iterator[TokenEvent]:
    """Every event until nothing is left."""
    while events := decoder.step():
        yield from events


def feed(
    decoder: Decoder, requests: Sequence[Request], *, in_flight: int
) -> Iterator[tuple[int, TokenEvent]]:
    """(index of the request, its event) for many requests, handed over in order with at most
    `in_flight` of them unfinished: a benchmark's tens of thousands never queue in the decoder, and
    neighbours, which often begin alike, run together. The caller may cancel by request id."""
    index_of: dict[int, int] = {}
    upcoming, unfinished = 0, 0
    while True:
        while unfinished < in_flight and upcoming < len(requests):
            index_of[decoder.add(requests[upcoming])] = upcoming
            upcoming, unfinished = upcoming + 1, unfinished + 1
        events = decoder.step()
        if not events:
            return
        for event in events:
            unfinished -= event.finish_reason is not None
            yield index_of[event.request_id], event


def completion(events: Iterable[TokenEvent]) -> Completion:
    """The completion that one request's events, in order, amount to."""
    seen = list(events)
    tokens = [event for event in seen if event.token >= 0]
    reason = seen[-1].finish_reason
    assert reason is not None, "an engine left a request unfinished"
    return Completion(
        tuple(event.token for event in tokens),
        tuple(event.logprob for event in tokens),
        reason,
        seen[0].prompt_scores,
    )


def loglikelihood(
    engine: Engine,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, bool]]:
    """For each (context ids, continuation ids): log p(continuation | context) in nats, and whether
    greedy decoding would have produced exactly it.

    As lm-eval does it: an over-long pair keeps its last `max_seq_len + 1` tokens (the last of them
    is only scored, never fed). Pairs are run in the order of their ids, so that those with a common
    beginning are neighbours and an engine can reuse what they share; equal pairs are run once.
    `tell` hears (pairs done, pairs to run).

    Raises:
        ConfigError: an empty context or continuation, or a continuation beyond `max_seq_len`.
    """
    limit = engine.options.max_seq_len or engine.model.max_position_embeddings
    jobs = [_scoring_job(context, continuation, limit) for context, continuation in pairs]
    order = sorted(set(jobs))
    requests = [Request(ids, 0, score_prompt=True) for ids, _ in order]
    scored: dict[tuple[tuple[int, ...], int], tuple[float, bool]] = {}
    in_flight = 2 * engine.options.max_batch_size
    for index, event in feed(engine.open(), requests, in_flight=in_flight):
        assert event.prompt_scores is not None, "an engine did not score a prompt"
        ids, length = order[index]
        logprobs, is_greedy = event.prompt_scores
        total = float(logprobs[-length:].sum(dtype="float64"))
        scored[ids, length] = (total, bool(is_greedy[-length:].all()))
        tell(len(scored), len(order))
    return [scored[job] for job in jobs]


def _scoring_job(
    context: Sequence[int], continuation: Sequence[int], limit: int
) -> tuple[tuple[int, ...], int]:
    """(the last `limit` + 1 ids of the pair, how many of them are the continuation)."""
    if not context or not continuation:
        empty = "continuation" if context else "context"
        raise ConfigError(
            f"cannot score a pair with an empty {empty}",
            fix="begin an empty context with the tokenizer's bos id",
        )
    if len(continuation) > limit:
        raise ConfigError(
            f"a continuation of {len(continuation)} tokens exceeds the model's {limit}",
            fix="score it in pieces, or with a model of longer context",
        )
    ids = tuple(int(token) for token in (*context, *continuation))
    return ids[-(limit + 1) :], len(continuation)
