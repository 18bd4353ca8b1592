"""What prompts share is computed once, kept as long as there is room, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from solollm_torch.engine import TorchEngine
from solollm_torch.model import Decoder

from solollm.architecture import ModelConfig
from solollm.backend import Decoder as Requests
from solollm.backend import EngineOptions, Request
from solollm.generation import loglikelihood

Counted = tuple[TorchEngine, Callable[[], int]]


@pytest.fixture(scope="module")
def decoder(tiny_config: ModelConfig) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(tiny_config)
    for name, weight in decoder.masters().items():
        noise = torch.randn(weight.shape, generator=generator)
        scale = weight.shape[-1] ** -0.5
        decoder.load([(name, scale * noise if weight.ndim == 2 else 1 + 0.1 * noise)])
    return decoder


@pytest.fixture
def counted(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Counted]:
    """An engine, and how many prompt tokens it has read since that was last asked."""

    def make(batch: int, prefix_slots: int = 0) -> Counted:
        options = EngineOptions(batch, backend_options={"prefix_slots": prefix_slots})
        engine = TorchEngine(decoder, options)
        fed: list[int] = []
        prefill = engine.inference.prefill

        def counting(input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
            fed.append(len(input_ids))
            return prefill(input_ids, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(engine.inference, "prefill", counting)

        def since() -> int:
            total = sum(fed)
            fed.clear()
            return total

        return engine, since

    return make


def ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 190, length).tolist()


def run(requests: Requests, prompt: Sequence[int], new: int = 2) -> list[int]:
    """The new tokens of one request that runs alone."""
    requests.add(Request(prompt, new))
    tokens: list[int] = []
    while events := requests.step():
        tokens += [event.token for event in events]
    return tokens


def test_the_slot_that_was_left_longest_ago_is_given_up(counted: Callable[..., Counted]) -> None:
    """Guards the order of forgetting: by age, not by length; a short new conversation must not be
    lost to keep an old long one."""
    engine, since = counted(2)
    requests = engine.open()
    old, new, other = ids(1, 100), ids(2, 40), ids(3, 60)
    for prompt in (old, new, other):
        run(requests, prompt)
    since()
    run(requests, [*new, 7, 8])
    assert since() <= 4
    run(requests, [*old, 7, 8])
    assert since() == 102


def test_a_common_beginning_costs_no_other_conversation_its_history(
    counted: Callable[..., Counted],
) -> None:
    """Guards two conversations under one system prompt: the second took the first one's slot."""
    engine, since = counted(2)
    requests = engine.open()
    system = ids(1, 30)
    first, second = [*system, *ids(2, 90)], [*system, *ids(3, 20)]
    run(requests, first)
    assert since() == 120
    run(requests, second)
    assert since() <= 21
    run(requests, [*first, 5])
    assert since() <= 3


def test_prefix_slots_keep_more_than_run_at_once(counted: Callable[..., Counted]) -> None:
    """Guards the option: one request at a time, and still three conversations are remembered."""
    engine, since = counted(1, 2)
    requests = engine.open()
    prompts = [ids(seed, 60) for seed in (1, 2, 3)]
    for prompt in prompts:
        run(requests, prompt)
    assert since() == 180
    for prompt in prompts:
        run(requests, [*prompt, 9])
    assert since() <= 9
    requests.add(Request(prompts[0], 4))
    requests.add(Request(ids(4, 5), 4))
    assert len({event.request_id for event in requests.step()}) == 1, "one runs at a time"


def test_examples_before_every_question_are_read_once(
    counted: Callable[..., Counted], decoder: Decoder
) -> None:
    """Guards few-shot benchmarks: many questions after the same examples, four answers each."""
    examples = ids(1, 50)
    pairs = [
        ([*examples, *ids(question, 75)], [answer])
        for question in range(10, 16)
        for answer in (3, 4, 5, 6)
    ]
    engine, since = counted(4)
    together = loglikelihood(engine, pairs)
    # The first four questions start together, each with the examples: too short to wait for. Of
    # what is shared one or two tokens are always read again: their output is what comes next.
    assert since() <= 4 * 50 + 6 * 75 + 2 * 6 * 4
    for (context, answer), (total, is_greedy) in zip(pairs, together, strict=True):
        with torch.no_grad():
            logits = decoder.logits(torch.tensor([context]))[0, -1]
        assert total == pytest.approx(float(logits.log_softmax(-1)[answer[0]]), abs=1e-5)
        assert is_greedy == (int(logits.argmax()) == answer[0])


@pytest.mark.parametrize("prefix_slots", [0, 3])
def test_what_is_shared_changes_no_token(
    counted: Callable[..., Counted], decoder: Decoder, prefix_slots: int
) -> None:
    """Guards reuse at every place it happens: of running, finished and overwritten sequences."""
    generator = np.random.default_rng(5)
    roots = [ids(seed, 40) for seed in (1, 2)]
    prompts = [
        [*roots[generator.integers(2)][: generator.integers(18, 41)],
         *generator.integers(0, 190, generator.integers(1, 30)).tolist()]
        for _ in range(24)
    ]  # fmt: skip
    alone = [
        run(TorchEngine(decoder, EngineOptions(1)).open(), prompt, new=5) for prompt in prompts
    ]
    engine, _ = counted(3, prefix_slots)
    requests = engine.open()
    found: dict[int, list[int]] = {requests.add(Request(prompt, 5)): [] for prompt in prompts}
    while events := requests.step():
        for event in events:
            found[event.request_id].append(event.token)
    assert list(found.values()) == alone
