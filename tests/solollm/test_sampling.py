"""The sampling reference against `transformers`, against probability theory, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from solollm.backend import SamplingParams
from solollm.errors import BackendError, ConfigError
from solollm.sampling import adjust, candidates, check_sampling, choose, draw, is_plain_greedy

VOCAB = 500
SETTINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=1),
    SamplingParams(temperature=1.3, top_k=40),
    SamplingParams(temperature=1.0, top_k=5000),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=0.8, top_p=1e-6),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=1.0, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, repetition_penalty=0.7),
    SamplingParams(temperature=0.9, top_k=100, top_p=0.8, min_p=0.02, repetition_penalty=1.2),
]


def transformers_probabilities(
    logits: np.ndarray, params: SamplingParams, history: np.ndarray
) -> np.ndarray:
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    scores = processors(torch.from_numpy(history)[None], torch.from_numpy(logits.copy())[None])
    return scores[0].softmax(-1).numpy()


def probabilities(logits: np.ndarray, params: SamplingParams, history: np.ndarray) -> np.ndarray:
    full = np.zeros(len(logits))
    kept = candidates(adjust(logits, params, history), params)
    full[kept.ids] = kept.probabilities
    return full


@pytest.mark.parametrize("params", SETTINGS, ids=repr)
def test_distribution_equals_transformers(params: SamplingParams) -> None:
    """Guards the order of the steps and each rule: the kept sets are equal, as are the shares."""
    generator = np.random.default_rng(1)
    for _ in range(20):
        logits = (generator.standard_normal(VOCAB) * 3).astype(np.float32)
        history = generator.integers(0, VOCAB, 30)
        expected = transformers_probabilities(logits, params, history)
        actual = probabilities(logits, params, history)
        np.testing.assert_array_equal(actual > 0, expected > 0)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_ties_at_the_border_follow_the_documented_rule() -> None:
    """Guards equal logits (bf16 makes many): top-k keeps all of them, top-p the lower ids."""
    logits = np.array([0.0, 1.0, 1.0, 1.0, -1.0], np.float32)
    assert candidates(logits, SamplingParams(1.0, top_k=2)).ids.tolist() == [1, 2, 3]
    assert candidates(logits, SamplingParams(1.0, top_p=0.5)).ids.tolist() == [1, 2]


@pytest.mark.parametrize("params", [SETTINGS[0], SETTINGS[-1]], ids=repr)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Guards the inverse of the cumulative sum and the random numbers: chi-square, fixed seeds."""
    logits = (np.random.default_rng(2).standard_normal(12) * 1.5).astype(np.float32)
    history = np.array([1, 2])
    choices = candidates(adjust(logits, params, history), params)
    count = 20_000
    drawn = [draw(choices, seed=7, position=position) for position in range(count)]
    observed = np.bincount(drawn, minlength=12)[choices.ids]
    expected = choices.probabilities * count
    degrees = len(expected) - 1
    assert sum(observed) == count
    # The 99.9% point of chi-square is below df + 3.1 sqrt(2 df) + 6 for these degrees of freedom.
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < degrees + 3.1 * (2 * degrees) ** 0.5 + 6


def test_draws_depend_on_seed_and_position_only() -> None:
    """Guards a stateful generator: the same (seed, position) gives the same token, others vary."""
    choices = candidates(np.zeros(1000, np.float32), SamplingParams(1.0))
    drawn = {(s, p): draw(choices, seed=s, position=p) for s in range(5) for p in range(5)}
    again = {(s, p): draw(choices, seed=s, position=p) for p in range(5) for s in range(5)}
    assert drawn == again
    assert len(set(drawn.values())) > 20


def test_padding_ids_are_never_chosen() -> None:
    """Guards the rows that pad the vocabulary to a multiple of 64, even against a processor."""
    logits = np.full(64, 0.0, np.float32)
    logits[60:] = 100.0

    def bring_back(ids: object, row: np.ndarray) -> np.ndarray:
        return np.where(np.isinf(row), np.float32(50), row)

    for params in (SamplingParams(), SamplingParams(temperature=2.0)):
        for position in range(50):
            history = np.zeros(position, np.int64)
            token = choose(logits, params, history, vocab_size=60, processors=[bring_back])
            assert token < 60


def test_logits_processors_see_the_history_and_decide() -> None:
    """Guards the hook that constrained decoding stands on."""
    seen: list[list[int]] = []

    def only_three(ids: object, row: np.ndarray) -> np.ndarray:
        seen.append(list(ids))  # type: ignore[call-overload]
        return np.where(np.arange(len(row)) == 3, row, -np.inf)

    logits = np.arange(8, dtype=np.float32)
    token = choose(logits, SamplingParams(), np.array([5, 6]), processors=[only_three])
    assert (token, seen) == (3, [[5, 6]])
    assert logits.tolist() == list(range(8)), "the caller's logits were written to"


def test_nothing_to_choose_is_an_error() -> None:
    """Guards NaN logits of a diverged model, and processors that forbid every token."""
    for row in (np.full(4, np.nan), np.full(4, -np.inf)):
        with pytest.raises(BackendError, match="no token can be chosen"):
            choose(row.astype(np.float32), SamplingParams(1.0), np.array([0]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
     ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1), ("min_p", float("nan")),
     ("repetition_penalty", 0.0)],
)  # fmt: skip
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    """Guards every setting that a request from outside can carry."""
    with pytest.raises(ConfigError, match=field):
        check_sampling(SamplingParams(**{field: value}))  # type: ignore[arg-type]


def test_defaults_are_plain_greedy() -> None:
    """Guards the short cut on the device: only the bare argmax may take it."""
    assert is_plain_greedy(SamplingParams())
    assert not is_plain_greedy(SamplingParams(temperature=0.1))
    assert not is_plain_greedy(SamplingParams(repetition_penalty=1.1))
    assert not is_plain_greedy(SamplingParams(), [lambda ids, row: row])


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    """Quotients beyond float32, of which no candidate is left."""
    logits = np.random.default_rng(3).normal(size=VOCAB).astype(np.float32) * 30
    params = SamplingParams(temperature=temperature, top_k=5, top_p=0.5)
    assert choose(logits, params, np.array([1])) == int(logits.argmax())


@pytest.mark.parametrize("penalty", [5e-324, 1e-176, 1e-30, 1e30, 1.7e308])
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_a_penalty_of_any_size_leaves_a_choice(penalty: float, sign: int) -> None:
    """Logits divided by nothing: 0 / 0 is no number, and the whole batch fails with it."""
    logits = np.full(VOCAB, sign, np.float32) * np.arange(VOCAB, dtype=np.float32)
    params = SamplingParams(temperature=1.0, repetition_penalty=penalty)
    assert 0 <= choose(logits, params, np.arange(VOCAB)) < VOCAB
