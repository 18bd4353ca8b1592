"""How good the weights of a session are right now: held-out loss, and a few samples to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from solollm.architecture import ModelConfig
from solollm.backend import Batch, EngineOptions, Request, SamplingParams, TrainSession
from solollm.config import EvalTable
from solollm.data.stream import EpochStream
from solollm.tokenizer import Tokenizer

_SAMPLING = SamplingParams(temperature=0.8, top_p=0.95)


class HeldOut(NamedTuple):
    """`loss` in nats per target; `targets` it was measured on."""

    loss: float
    bits_per_byte: float
    targets: int
    facts: Mapping[str, float] = {}


class Score(NamedTuple):
    """What a stream of its own kind makes of one batch: `loss` and `facts` are sums over
    `items` pairs or prompts."""

    loss: float
    items: int
    facts: Mapping[str, float]


@runtime_checkable
class Scoring(Protocol):
    """A held-out stream that is not measured by the language-model loss."""

    def score(self, session: TrainSession, batch: Batch) -> Score: ...


class Sample(NamedTuple):
    """A prompt and what the model made of it."""

    prompt: str
    text: str


def bits_per_byte(loss: float, bytes_per_target: float) -> float:
    """Nats per target as bits per byte of text, which do not depend on the tokenizer."""
    return loss / math.log(2) / bytes_per_target


def held_out_loss(session: TrainSession, stream: EpochStream, batches: int) -> HeldOut:
    """The loss over the first `batches` batches of the stream, the same ones every time. Over a
    part of the split, bits per byte use the whole split's bytes per target."""
    if isinstance(stream, Scoring):
        return _scored(session, stream, stream.epoch(batches))
    nll, targets = 0.0, 0
    for batch in stream.epoch(batches):
        batch_nll, batch_targets = session.eval_step(batch)
        nll, targets = nll + batch_nll, targets + batch_targets
    loss = nll / max(1, targets)
    return HeldOut(loss, bits_per_byte(loss, stream.bytes_per_target), targets)


def _scored(session: TrainSession, scoring: Scoring, batches: Iterable[Batch]) -> HeldOut:
    scores = [scoring.score(session, batch) for batch in batches]
    count = max(1, sum(score.items for score in scores))
    names = scores[0].facts if scores else {}
    facts = {name: sum(score.facts[name] for score in scores) / count for name in names}
    return HeldOut(sum(score.loss for score in scores) / count, math.nan, count, facts)


def samples(
    session: TrainSession,
    tokenizer: Tokenizer,
    model: ModelConfig,
    table: EvalTable,
    *,
    is_chat: bool = False,
) -> list[Sample]:
    """Continue each of the config's prompts, with the same random bits every time; `is_chat`:
    answer it."""
    from solollm.generation import generate

    def ids_of(prompt: str) -> list[int]:
        if is_chat:
            return tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]

    room = model.max_position_embeddings
    new_tokens = min(table.sample_tokens, room - 1)
    requests = [
        Request(
            prompt_ids=ids_of(prompt)[: room - new_tokens],
            max_new_tokens=new_tokens,
            sampling=_SAMPLING,
            stop_ids=frozenset(tokenizer.stop_ids),
        )
        for prompt in table.sample_prompts
    ]
    engine = session.engine(EngineOptions(vocab_size=tokenizer.vocab_size))
    completions = generate(engine, requests)
    engine.close()
    return [
        Sample(prompt, tokenizer.decode(completion.text_ids))
        for prompt, completion in zip(table.sample_prompts, completions, strict=True)
    ]
