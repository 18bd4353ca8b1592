"""Latency: what is counted, not how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from solollm.architecture import ModelConfig
from solollm.backend import EngineOptions
from solollm.completion import TextModel
from solollm.errors import ConfigError
from solollm.evaluation.latency import measure_latency, weight_bytes
from solollm.testing.scripted import ScriptedEngine
from solollm.tokenizer import Tokenizer


@pytest.fixture
def model(
    tmp_path: Path, save_telling: Callable[[Path, ModelConfig], Path], small_tokenizer: Tokenizer
) -> TextModel:
    config = ModelConfig(
        vocab_size=small_tokenizer.padded_vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=128,
    )  # fmt: skip

    def reply(ids: Sequence[int]) -> list[int]:
        return [7] * 200

    options = EngineOptions(max_batch_size=3, vocab_size=small_tokenizer.vocab_size)
    engine = ScriptedEngine(config, options, lambda ids: 0.0, reply)
    return TextModel(engine, small_tokenizer, save_telling(tmp_path, config), False, frozenset())


def _backend(bandwidth: float) -> Any:
    return SimpleNamespace(copy_bytes_per_second=lambda: bandwidth)


def test_batch_one_and_the_whole_batch_are_measured(model: TextModel) -> None:
    """Tokens of one sequence counted as those of all, or the first token as a decoded one."""
    # Of one round both figures come from the same times, and only the counts can differ.
    found = measure_latency(model, _backend(1e9), prompt_tokens=20, new_tokens=11, rounds=1)
    assert [speed.batch_size for speed in found.speeds] == [1, 3]
    for speed in found.speeds:
        per_second = 1000 * speed.batch_size / speed.decode_ms_per_token
        assert speed.tokens_per_second == pytest.approx(per_second)
    alone = found.speeds[0].decode_ms_per_token / 1000
    assert found.bandwidth_share == pytest.approx(found.bytes_per_token / alone / 1e9)


def test_a_token_reads_every_weight_but_the_embedding(model: TextModel) -> None:
    """The embedding counted although one row of it is read; halves counted as floats."""
    config = model.engine.model
    embedding = config.vocab_size * config.hidden_size
    assert weight_bytes(model) == 4 * (config.num_parameters() - embedding)
    found = measure_latency(model, _backend(0.0), prompt_tokens=20, new_tokens=10, rounds=1)
    # at position 25: keys and values of 2 layers, 1 head of 16
    assert found.bytes_per_token == weight_bytes(model) + 4 * 25 * 2 * 2 * 16
    assert found.bandwidth_share is None


def test_what_does_not_fit_is_said(model: TextModel) -> None:
    """A prompt that the engine refuses in the middle of the measurement."""
    with pytest.raises(ConfigError, match="context holds 128"):
        measure_latency(model, _backend(0.0), prompt_tokens=120, new_tokens=9)
