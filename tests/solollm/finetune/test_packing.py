"""Which samples share a row, and the batches made of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solollm.backend import IGNORED
from solollm.errors import ConfigError, DataError
from solollm.finetune.packing import SampleStream, pack
from solollm.finetune.rendering import Rendered
from solollm.finetune.samples import Samples, SampleSet
from solollm.tokenizer import Tokenizer

ROWS = {"seq_len": 32, "batch_size": 3, "seed": 5, "packing": True}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60))
def test_every_sample_has_its_place_and_no_row_overflows(lengths: list[int]) -> None:
    """Guards: a sample lost or doubled; a row longer than a row. Best fit needs fewer than twice
    the rows that the tokens need at least."""
    rows = pack(lengths, 40)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert all(total <= 40 for total in totals)
    assert len(rows) <= 2 * -(-sum(lengths) // 40)
    half_empty = [total for total in totals if total <= 20]
    assert len(half_empty) <= 1


def sample_set(tokenizer: Tokenizer, group: int = 1) -> SampleSet:
    noise = np.random.default_rng(1)
    rendered = []
    for _ in range(40):
        ids = noise.integers(10, 280, noise.integers(4, 30)).astype(np.int32)
        produced = np.arange(len(ids)) >= len(ids) // 2
        rendered.append(Rendered(ids, produced))
    return SampleSet.of(
        tokenizer, Samples.of(rendered, group=group), Samples.of([], group=group), sources=["x"]
    )


def test_an_epoch_learns_every_produced_token_once(small_tokenizer: Tokenizer) -> None:
    """Guards: a label shifted wrongly, a border that joins two samples, padding that is learnt."""
    samples = sample_set(small_tokenizer)
    stream = SampleStream(samples, "train", **ROWS)  # type: ignore[arg-type]
    learnt: list[tuple[int, ...]] = []
    for batch in stream.epoch():
        assert batch.segment_ids is not None
        assert batch.denominator == (batch.labels != IGNORED).sum()
        for ids, labels, segments in zip(
            batch.input_ids, batch.labels, batch.segment_ids, strict=True
        ):
            places = [np.flatnonzero(segments == number) for number in range(segments.max() + 1)]
            learnt += [_learnt(ids[place], labels[place]) for place in places]
    train = samples.train
    expected = [
        tuple(train.sample(i).ids[1:][train.sample(i).produced[1:]].tolist()) for i in range(40)
    ]
    assert sorted(filter(None, learnt)) == sorted(expected)
    assert stream.num_targets == sum(map(len, expected))
    assert stream.fill > 0.8


def _learnt(ids: np.ndarray, labels: np.ndarray) -> tuple[int, ...]:
    """The labels of one segment, after a look at whether each is the input that follows."""
    kept = labels != IGNORED
    assert np.array_equal(ids[1:][kept[:-1]], labels[:-1][kept[:-1]])
    return tuple(labels[kept].tolist())


def test_batches_are_a_function_of_seed_and_step(small_tokenizer: Tokenizer) -> None:
    """Guards: an order that depends on what was asked before, or is the same in every epoch."""
    samples = sample_set(small_tokenizer)
    first, again = (SampleStream(samples, "train", **ROWS) for _ in range(2))  # type: ignore[arg-type]
    steps = first.steps_per_epoch
    late = again.batch(steps + 1)
    for step in range(steps + 2):
        batch = first.batch(step)
    assert np.array_equal(batch.input_ids, late.input_ids)
    assert not np.array_equal(first.batch(0).input_ids, first.batch(steps).input_ids)
    other = SampleStream(samples, "train", **{**ROWS, "seed": 6})  # type: ignore[arg-type]
    assert not np.array_equal(first.batch(0).input_ids, other.batch(0).input_ids)
    assert first.fingerprint == again.fingerprint
    for change in ({"batch_size": 4}, {"seq_len": 40}, {"packing": False}):
        changed = SampleStream(samples, "train", **{**ROWS, **change})  # type: ignore[arg-type]
        assert changed.fingerprint != first.fingerprint


def test_unpacked_rows_hold_one_sample_and_are_cut_to_the_longest(
    small_tokenizer: Tokenizer,
) -> None:
    """Guards: padding computed for nothing, or a sample cut with it."""
    samples = sample_set(small_tokenizer)
    stream = SampleStream(samples, "train", **{**ROWS, "seq_len": 256, "packing": False})  # type: ignore[arg-type]
    assert stream.num_rows == 40
    assert {batch.input_ids.shape[1] for batch in stream.epoch()} == {64}


def test_pairs_stay_together(small_tokenizer: Tokenizer) -> None:
    """Guards: a rejected answer compared with another question's chosen one."""
    samples = sample_set(small_tokenizer, group=2)
    stream = SampleStream(samples, "train", **{**ROWS, "batch_size": 4})  # type: ignore[arg-type]
    batch = stream.batch(0)
    assert batch.pair_ids is not None
    assert batch.pair_ids.tolist() == [0, 0, 1, 1]
    starts = [tuple(samples.train.sample(i).ids[:3].tolist()) for i in range(40)]
    neighbours = set(pairwise(starts))
    for pair in (batch.input_ids[:2], batch.input_ids[2:]):
        assert tuple(tuple(row[:3].tolist()) for row in pair) in neighbours
    with pytest.raises(ConfigError, match="splits pairs"):
        SampleStream(samples, "train", **ROWS)  # type: ignore[arg-type]


def test_what_fits_no_row_is_refused(small_tokenizer: Tokenizer) -> None:
    """Guards: a row length changed under a run's samples."""
    samples = sample_set(small_tokenizer)
    with pytest.raises(ConfigError, match="positions, a row 8"):
        SampleStream(samples, "train", **{**ROWS, "seq_len": 8})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no held-out samples"):
        SampleStream(samples, "held_out", **ROWS)  # type: ignore[arg-type]
