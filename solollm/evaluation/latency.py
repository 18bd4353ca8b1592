"""How fast a model reads and writes: milliseconds per token, alone and in a batch.

Every round takes prompts that were never seen, so that nothing is reused, and generates greedily
without stop ids. Wall time is what a user waits; process time is what the work cost, and the only
one of the two that means something on a machine that is busy with other things.

Decoding one sequence reads every weight once per token, so memory bandwidth is its ceiling: `share`
is what the engine reached of the bandwidth that copying memory reaches here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from solollm.backend import Backend, Engine, Request
from solollm.completion import TextModel
from solollm.errors import ConfigError
from solollm.evaluation.energy import Energy, EnergyMeter
from solollm.generation import feed

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds. Prefill counts prompt tokens of all sequences until each has its
    first token; `decode_ms_per_token` is the time between two tokens of one sequence,
    `decode_cpu_ms_per_token` the process time per token of any, `tokens_per_second` of all."""

    batch_size: int
    prefill_ms_per_token: float
    decode_ms_per_token: float
    decode_cpu_ms_per_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Latency:
    """`bandwidth_share` is of one sequence; None where the backend measures no bandwidth."""

    prompt_tokens: int
    new_tokens: int
    rounds: int
    speeds: tuple[Speed, ...]
    bytes_per_token: float
    copy_bytes_per_second: float
    bandwidth_share: float | None
    energy: Energy
    joules_per_token: float | None


def measure_latency(
    model: TextModel,
    backend: Backend,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    rounds: int = 3,
    seed: int = 0,
    tell: Tell = lambda kind, done, total: None,
) -> Latency:
    """Time an engine at batch 1 and at its `max_batch_size`, after a round of warming up.

    Raises:
        ConfigError: prompt and new tokens exceed the model's context.
    """
    if prompt_tokens + new_tokens > model.max_seq_len or new_tokens < 2:
        raise ConfigError(
            f"{prompt_tokens} + {new_tokens} tokens do not fit",
            why=f"the model's context holds {model.max_seq_len}",
            fix="give fewer, and at least 2 new ones",
        )
    engine, generator = model.engine, np.random.default_rng(seed)
    sizes = sorted({1, engine.options.max_batch_size})
    done, total = 0, len(sizes) * (rounds + 1)
    speeds: list[Speed] = []
    written = 0
    with EnergyMeter() as meter:
        for size in sizes:
            timings = []
            for _ in range(rounds + 1):
                prompts = generator.integers(
                    0, model.tokenizer.vocab_size, (size, prompt_tokens)
                ).tolist()
                timings.append(_round(engine, prompts, new_tokens))
                written += size * new_tokens
                done += 1
                tell("latency", done, total)
            speeds.append(_medians(size, prompt_tokens, new_tokens, timings[1:]))
    read = weight_bytes(model) + cache_bytes(model, prompt_tokens + new_tokens // 2)
    copied = backend.copy_bytes_per_second()
    share = read / (speeds[0].decode_ms_per_token / 1000) / copied if copied else None
    energy = meter.result
    return Latency(
        prompt_tokens, new_tokens, rounds, tuple(speeds), read, copied, share, energy,
        None if energy.joules is None else energy.joules / written,
    )  # fmt: skip


class _Round(NamedTuple):
    """Seconds until every sequence has its first token; after that: seconds, process seconds, and
    tokens of all sequences."""

    prefill: float
    decode: float
    decode_cpu: float
    tokens: int


def _round(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> _Round:
    requests = [Request(prompt, new_tokens) for prompt in prompts]
    decoder = engine.open()
    begun = first = time.perf_counter()
    first_cpu = time.process_time()
    waiting, tokens = set(range(len(requests))), 0
    for index, _ in feed(decoder, requests, in_flight=len(requests)):
        if waiting:
            waiting.discard(index)
            first, first_cpu, tokens = time.perf_counter(), time.process_time(), 0
        else:
            tokens += 1
    return _Round(
        first - begun, time.perf_counter() - first, time.process_time() - first_cpu, tokens
    )


def _medians(size: int, prompt_tokens: int, new_tokens: int, rounds: Sequence[_Round]) -> Speed:
    return Speed(
        batch_size=size,
        prefill_ms_per_token=median(1000 * r.prefill / (size * prompt_tokens) for r in rounds),
        decode_ms_per_token=median(1000 * r.decode / (new_tokens - 1) for r in rounds),
        decode_cpu_ms_per_token=median(1000 * r.decode_cpu / r.tokens for r in rounds),
        tokens_per_second=median(r.tokens / r.decode for r in rounds),
    )


def weight_bytes(model: TextModel) -> float:
    """Bytes of weights that one token reads: all of them but the embedding's other rows. A tied
    embedding is read whole, as the head. Quantised folders count as their files have it."""
    from solollm.tensorfile import open_weights

    config = model.engine.model
    weights = open_weights(model.checkpoint)
    try:
        names = set(weights.names())
    finally:
        weights.close()
    parameters = config.num_parameters()
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    if any(name.endswith(".scales") for name in names):  # MLX's affine codes
        files = sum(file.stat().st_size for file in model.checkpoint.glob("*.safetensors"))
        return files * parameters / config.num_parameters()
    return float(parameters * element_bytes(model))


def cache_bytes(model: TextModel, positions: int) -> float:
    """Bytes of keys and values that one token reads at this position."""
    config = model.engine.model
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return float(per_position * positions * element_bytes(model))


def element_bytes(model: TextModel) -> int:
    """Bytes per number in the engine; "auto" counts as float32."""
    return 2 if model.engine.options.compute_dtype in ("bfloat16", "float16") else 4
