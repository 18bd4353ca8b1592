"""Conformance checks of generation; see `solollm.testing.conformance`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from solollm.backend import (
    IGNORED,
    Batch,
    DictSource,
    Engine,
    EngineOptions,
    HostTensor,
    Request,
    SamplingParams,
    TokenEvent,
    TrainSession,
)
from solollm.durable import staged_directory
from solollm.errors import ConfigError
from solollm.generation import generate
from solollm.tensorfile import write_tensors
from solollm.testing.bench import (
    POSITIONS,
    REAL_VOCAB_SIZE,
    Bench,
    lively_parameters,
    next_logprobs,
    prompts,
    request,
    require,
    tokens_of,
    train,
)

OPTIONS = EngineOptions(max_batch_size=4, vocab_size=REAL_VOCAB_SIZE)


def events_of(engine: Engine, requests: Sequence[Request]) -> list[list[TokenEvent]]:
    """The events of each request, all added before the first step."""
    decoder = engine.open()
    ids = [decoder.add(item) for item in requests]
    require(len(set(ids)) == len(ids), f"request ids repeat: {ids}")
    events: list[TokenEvent] = []
    while new := decoder.step():
        events += new
    return [[event for event in events if event.request_id == i] for i in ids]


def greedy_decode_follows_the_training_model(bench: Bench) -> None:
    """A cache at the wrong position, another scale or norm: what is served is not what was
    trained."""
    session = bench.lively_session()
    for prompt in prompts(3):
        (events,) = events_of(session.engine(OPTIONS), [request(prompt, new=4)])
        require(len(events) == 4, f"{len(events)} events for 4 tokens")
        ids = list(prompt)
        for event in events:
            expected = next_logprobs(session, ids)
            best = int(expected[:REAL_VOCAB_SIZE].argmax())
            require(event.token == best, f"token {event.token} after {ids}, not {best}")
            np.testing.assert_allclose(event.logprob, expected[best], rtol=0, atol=1e-4)
            ids.append(event.token)


def training_distribution_is_normalised(bench: Bench) -> None:
    """A partial softmax (one shard, one chunk of the vocabulary) is no probability."""
    logprobs = next_logprobs(bench.lively_session(), prompts(2)[1])
    np.testing.assert_allclose(np.exp(logprobs.astype(np.float64)).sum(), 1, rtol=0, atol=1e-4)


def batched_equals_one_by_one(bench: Bench) -> None:
    """Padding that is attended to, a position shared by a batch, a slot that keeps the last
    request's cache: more requests than slots, of different lengths."""
    engine = bench.lively_session().engine(OPTIONS)
    requests = [request(p, new=3 + i % 4) for i, p in enumerate(prompts(9))]
    together = events_of(engine, requests)
    for item, events in zip(requests, together, strict=True):
        (alone,) = events_of(engine, [item])
        got, expected = [e.token for e in events], [e.token for e in alone]
        require(got == expected, f"{item.prompt_ids}: {got} in a batch, {expected} alone")
        np.testing.assert_allclose(
            [e.logprob for e in events], [e.logprob for e in alone], rtol=0, atol=1e-4
        )


def requests_may_join_between_steps(bench: Bench) -> None:
    """Continuous batching that disturbs the requests under way."""
    engine, (first, second, *_) = bench.lively_session().engine(OPTIONS), prompts(4)[1:]
    decoder = engine.open()
    one = decoder.add(request(first, new=8))
    events = [*decoder.step(), *decoder.step()]
    two = decoder.add(request(second, new=4))
    while new := decoder.step():
        events += new
    for request_id, prompt, count in ((one, first, 8), (two, second, 4)):
        (alone,) = events_of(engine, [request(prompt, new=count)])
        got, expected = tokens_of(events, request_id), [e.token for e in alone]
        require(got == expected, f"{got} joined, {expected} alone")


def cancelled_requests_end_and_disturb_nobody(bench: Bench) -> None:
    """A closed chat window that goes on computing, or takes its neighbour along."""
    engine, (first, second, third, fourth) = bench.lively_session().engine(OPTIONS), prompts(4)
    decoder = engine.open()
    ids = [decoder.add(request(p, new=8)) for p in (first, second, third, fourth)]
    events = list(decoder.step())
    decoder.cancel(ids[1])
    decoder.cancel(987654)  # unknown, or long finished: no error
    while new := decoder.step():
        events += new
    of_cancelled = [e for e in events if e.request_id == ids[1]]
    require(of_cancelled[-1].finish_reason == "cancelled", f"cancelled: {of_cancelled}")
    require(of_cancelled[-1].token == -1, "a cancelled request ended with a token")
    require(len(tokens_of(events, ids[1])) <= 1, "a cancelled request went on")
    for request_id, prompt in zip(ids, (first, second, third, fourth), strict=True):
        if request_id != ids[1]:
            (alone,) = events_of(engine, [request(prompt, new=8)])
            same = tokens_of(events, request_id) == [e.token for e in alone]
            require(same, "cancelling changed another request")


def padding_ids_are_never_sampled(bench: Bench) -> None:
    """The vocabulary is padded to 64: an id past its end has no text."""
    tensors = lively_parameters(bench.model)
    name = "model.embed_tokens.weight" if bench.model.tie_word_embeddings else "lm_head.weight"
    head = tensors[name].data.copy()
    head[REAL_VOCAB_SIZE:] *= 20  # the padding rows would win often
    session = bench.session()
    session.import_parameters(DictSource({**tensors, name: HostTensor.of(head)}))
    wide = next_logprobs(session, prompts(2)[1])
    require(int(wide.argmax()) >= REAL_VOCAB_SIZE, "this check needs a tempting padding id")
    sampling = [SamplingParams(), SamplingParams(temperature=3.0, seed=1),
                SamplingParams(temperature=1.0, top_k=5, seed=2)]  # fmt: skip
    requests = [
        Request(prompt_ids=tuple(p), max_new_tokens=6, sampling=s)
        for p in prompts(4)
        for s in sampling
    ]
    for events in events_of(session.engine(OPTIONS), requests):
        tokens = [event.token for event in events]
        require(max(tokens) < REAL_VOCAB_SIZE, f"a padding id among {tokens}")


def seeds_decide_and_neighbours_do_not(bench: Bench) -> None:
    """One random stream for the whole batch: no answer could be reproduced."""
    engine, prompt = bench.lively_session().engine(OPTIONS), prompts(4)[3]
    crowd = [request(p, seed=50 + i) for i, p in enumerate(prompts(5))]
    (alone,) = events_of(engine, [request(prompt, new=8, seed=9)])
    *_, among = events_of(engine, [*crowd, request(prompt, new=8, seed=9)])
    same = [e.token for e in alone] == [e.token for e in among]
    require(same, "a seeded request depends on its neighbours")
    others = [events_of(engine, [request(prompt, new=8, seed=s)])[0] for s in (10, 11, 12)]
    tokens = {tuple(e.token for e in events) for events in [alone, *others]}
    require(len(tokens) > 1, "the seed has no effect")


def requests_end_as_asked(bench: Bench) -> None:
    """A stop id passed over, one token too many, an end that is never told."""
    engine, prompt = bench.lively_session().engine(OPTIONS), prompts(4)[2]
    (free,) = events_of(engine, [request(prompt, new=6)])
    reasons = [event.finish_reason for event in free]
    require(reasons == [None] * 5 + ["length"], f"finish reasons {reasons}")
    stop = free[2].token
    stopping = replace(request(prompt, new=6), stop_ids=frozenset({stop}))
    (stopped,) = events_of(engine, [stopping])
    end = [event.token for event in free].index(stop)
    require([e.token for e in stopped] == [e.token for e in free[: end + 1]], "not at the stop id")
    require(stopped[-1].finish_reason == "stop", f"reason {stopped[-1].finish_reason}")
    decoder = engine.open()
    require(decoder.step() == [], "an idle decoder gives events")


def generation_ends_at_the_engines_length(bench: Bench) -> None:
    """A cache written past its end."""
    options = replace(OPTIONS, max_seq_len=12)
    engine, prompt = bench.lively_session().engine(options), prompts(4)[2]
    (events,) = events_of(engine, [request(prompt, new=1000)])
    require(events[-1].finish_reason == "length", "no end at max_seq_len")
    require(len(prompt) + len(events) <= 13, f"{len(events)} tokens in 12 positions")


def prompt_scores_equal_token_logprobs(bench: Bench) -> None:
    """Scores shifted by one: every multiple-choice benchmark would be noise."""
    session = bench.lively_session()
    asked = zip(prompts(4), (0, 2, 2, 0), strict=True)
    scored = [replace(request(prompt, new=n), score_prompt=True) for prompt, n in asked]
    for item, events in zip(scored, events_of(session.engine(OPTIONS), scored), strict=True):
        ids, scores = list(item.prompt_ids), events[0].prompt_scores
        if scores is None:
            raise AssertionError(f"no prompt scores for {item}")
        require(len(events) == max(1, item.max_new_tokens), f"{len(events)} events")
        if item.max_new_tokens == 0:
            require(events[0].token == -1, "a token that was not asked for")
        require(scores.logprobs.shape == (len(ids) - 1,), f"shape {scores.logprobs.shape}")
        expected = _prompt_logprobs(session, ids)
        np.testing.assert_allclose(scores.logprobs, expected, rtol=0, atol=1e-4)
        for place in range(1, len(ids)):
            best = next_logprobs(session, ids[:place])[:REAL_VOCAB_SIZE].argmax()
            require(bool(scores.is_greedy[place - 1]) == (best == ids[place]), "is_greedy is wrong")


def _prompt_logprobs(session: TrainSession, ids: list[int]) -> np.ndarray:
    """float32 [n - 1]: what the training model gives to ids 1 to n - 1."""
    input_ids = np.zeros((1, POSITIONS), np.int32)
    input_ids[0, : len(ids)] = ids
    labels = np.full((1, POSITIONS), IGNORED, np.int32)
    labels[0, : len(ids) - 1] = ids[1:]
    return session.token_logprobs(Batch(input_ids, labels, 1.0))[0, : len(ids) - 1]


def logits_processors_are_obeyed(bench: Bench) -> None:
    """A constraint (JSON, a tool call) that the greedy shortcut passes by."""
    seen: list[int] = []

    def force(ids: Sequence[int], logits: np.ndarray) -> np.ndarray:
        seen.append(len(ids))
        forced = np.full_like(logits, -np.inf)
        forced[17] = 0
        return forced

    item = replace(request(prompts(2)[1], new=3), logits_processors=(force,))
    (events,) = events_of(bench.lively_session().engine(OPTIONS), [item])
    require([event.token for event in events] == [17] * 3, f"{events}")
    start = len(item.prompt_ids)
    require(seen == [start, start + 1, start + 2], f"processors saw {seen} tokens")


def impossible_requests_are_refused(bench: Bench) -> None:
    """An id past the table reads foreign memory; an empty prompt has nothing to continue."""
    engine = bench.lively_session().engine(replace(OPTIONS, max_seq_len=16))
    for prompt in ([], [REAL_VOCAB_SIZE], [-1], [1] * 17):
        decoder = engine.open()
        try:
            decoder.add(request(prompt))
        except ConfigError:
            require(decoder.step() == [], "a refused request is run")
        else:
            raise AssertionError(f"a request was taken: {prompt}")


def engine_reads_the_sessions_own_weights(bench: Bench) -> None:
    """An engine over yesterday's weights: samples, and rollouts, of another model."""
    session = bench.lively_session()
    prompt = prompts(4)[2]
    events_of(session.engine(OPTIONS), [request(prompt)])
    train(session, range(4))
    (events,) = events_of(session.engine(OPTIONS), [request(prompt, new=1)])
    expected = next_logprobs(session, prompt)
    require(events[0].token == int(expected[:REAL_VOCAB_SIZE].argmax()), "another token")
    np.testing.assert_allclose(events[0].logprob, expected[events[0].token], rtol=0, atol=1e-4)


def engine_of_a_checkpoint_equals_the_sessions(bench: Bench) -> None:
    """Weights read in another orientation, a tied head read twice, a config half understood."""
    session = bench.lively_session()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        with staged_directory(checkpoint) as staging:
            config = json.dumps(bench.model.to_hf())
            (staging / "config.json").write_text(config, encoding="utf-8")
            snapshot = session.snapshot()
            specs = list(snapshot.parameter_specs())
            write_tensors(staging / "model.safetensors", specs, snapshot.parameters())
            snapshot.close()
        engine = bench.backend.engine(checkpoint, replace(OPTIONS, compute_dtype="float32"))
        requests = [request(prompt, new=5) for prompt in prompts(4)]
        loaded = generate(engine, requests)
        engine.close()
    own = generate(session.engine(OPTIONS), requests)
    for ours, theirs in zip(own, loaded, strict=True):
        require(ours.ids == theirs.ids, f"{theirs.ids} from the checkpoint, {ours.ids} live")
        np.testing.assert_allclose(theirs.logprobs, ours.logprobs, rtol=0, atol=1e-4)


CHECKS = (
    greedy_decode_follows_the_training_model,
    training_distribution_is_normalised,
    batched_equals_one_by_one,
    requests_may_join_between_steps,
    cancelled_requests_end_and_disturb_nobody,
    padding_ids_are_never_sampled,
    seeds_decide_and_neighbours_do_not,
    requests_end_as_asked,
    generation_ends_at_the_engines_length,
    prompt_scores_equal_token_logprobs,
    logits_processors_are_obeyed,
    impossible_requests_are_refused,
    engine_reads_the_sessions_own_weights,
    engine_of_a_checkpoint_equals_the_sessions,
)
