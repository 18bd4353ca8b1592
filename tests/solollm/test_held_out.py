"""Held-out loss and samples, on the torch backend."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from solollm.config import EvalTable
from solollm.data.stream import open_stream
from solollm.held_out import bits_per_byte, held_out_loss, samples
from solollm.pretraining import prepare
from solollm.resume_proof import tiny_config
from solollm.tokenizer import Tokenizer

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def prepared(small_corpus: Path, small_tokenizer: Tokenizer):
    return prepare(tiny_config(small_corpus, small_tokenizer.padded_vocab_size, 4))


@pytest.fixture(scope="module")
def session(prepared):
    from solollm.horizon import session_options

    options = session_options(prepared.config, prepared.backend)
    session = prepared.backend.train_session(prepared.shape.model, options, prepared.plan)
    yield session
    session.close()


def test_over_a_whole_epoch_bits_per_byte_are_exact(session, small_corpus: Path) -> None:
    """Guards against bits per token, nats per byte, and targets counted twice."""
    stream = open_stream(small_corpus, split="validation", seq_len=64, batch_size=4)
    measured = held_out_loss(session, stream, stream.steps_per_epoch)
    assert measured.targets == stream.num_targets
    nats = sum(session.eval_step(batch)[0] for batch in stream.epoch())
    assert measured.loss == pytest.approx(nats / stream.num_targets, rel=1e-12)
    assert measured.bits_per_byte == pytest.approx(nats / math.log(2) / stream.num_bytes, rel=1e-12)
    assert bits_per_byte(math.log(2), 1.0) == pytest.approx(1.0)


def test_a_part_of_the_split_is_the_same_part_each_time(session, small_corpus: Path) -> None:
    """Guards against a limit that is ignored, or a curve that moves with the text drawn."""
    stream = open_stream(small_corpus, split="validation", seq_len=64, batch_size=2)
    first, second = (held_out_loss(session, stream, 2) for _ in range(2))
    assert first == second
    assert 0 < first.targets < stream.num_targets


def test_samples_are_repeatable_and_continue_each_prompt(
    session, prepared, small_tokenizer: Tokenizer
) -> None:
    """Guards against samples that differ because of luck, and against padding ids in them."""
    table = EvalTable(sample_prompts=("", "def ", "x" * 500), sample_tokens=5)
    drawn = [
        samples(session, small_tokenizer, prepared.shape.model, table) for _ in range(2)
    ]  # the last prompt is longer than the model's positions, and is cut
    assert drawn[0] == drawn[1]
    assert [sample.prompt for sample in drawn[0]] == list(table.sample_prompts)
    assert any(sample.text for sample in drawn[0])
