"""Memory of dead tensors: whose it becomes, how much of it is kept; a step needs no new."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from solollm_torch import kept_mappings
from solollm_torch.memory import memory_costs

from solollm.architecture import ModelConfig
from solollm.backend import Batch, SessionOptions
from solollm.config import OptimizerTable

MB = 1 << 18  # float32 elements


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    """The allocator, in use; a session on the CPU leaves it in use, too."""
    found = kept_mappings.load()
    if found is None:
        pytest.skip("there is no C++ compiler here")
    kept_mappings.give_back()  # what sessions of earlier tests have left: of these very sizes, too
    found.use_kept_mappings(1)
    yield found
    kept_mappings.give_back()


def resident() -> int:
    size: int = psutil.Process().memory_info().rss
    return size


def test_a_tensor_takes_the_memory_of_one_that_died(library: ctypes.CDLL) -> None:
    """Pages that are zeroed by the kernel for every temporary of a step."""
    first = torch.ones(3 * MB)
    place = first.data_ptr()
    assert place % 64 == 0
    del first
    before = library.kept_mappings_mapped_bytes()
    assert torch.empty(3 * MB).data_ptr() == place
    assert library.kept_mappings_mapped_bytes() == before


def test_what_is_kept_is_bounded_by_the_peak(library: ctypes.CDLL) -> None:
    """Sizes that never come again (samples, evaluations) filling the memory of a long run."""
    kept_mappings.give_back()
    begun = resident()
    for extra in range(30):
        torch.ones(20 * MB + 4096 * extra)
    assert resident() - begun < 2.5 * 20 * (1 << 20)
    kept_mappings.give_back()
    assert resident() - begun < 10 * (1 << 20)


def test_what_cannot_be_had_is_said_as_pytorch_says_it(library: ctypes.CDLL) -> None:
    """The supervisor knows want of memory by these words; a crash it would not."""
    with pytest.raises(RuntimeError, match="can't allocate memory: you tried to allocate"):
        torch.empty(1 << 58)
    assert torch.ones(2 * MB).sum() == 2 * MB


def test_threads_get_memory_of_their_own(library: ctypes.CDLL) -> None:
    """A snapshot's thread and the training thread with one tensor in the same place."""
    wrong: list[int] = []

    def work(number: int) -> None:
        for size in range(MB, MB + 40):
            held = [torch.full((size,), float(number)) for _ in range(2)]
            wrong.extend(number for one in held if not bool((one == number).all()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_step_maps_nothing_new(
    library: ctypes.CDLL,
    make_session: Callable[..., Any],
    make_batch: Callable[..., Batch],
    tiny_config: ModelConfig,
    recomputes: bool,
) -> None:
    """A bound that is too low: each block gives back what the next one asks for again."""
    deep = tiny_config.model_copy(update={"num_hidden_layers": 6})
    session = make_session(deep, micro_batch_size=64, activation_checkpointing=recomputes)
    batch = make_batch(64, 128, tiny_config.vocab_size)
    for _ in range(2):
        session.train_step(batch, lr=1e-3).result()
    before = library.kept_mappings_mapped_bytes()
    session.train_step(batch, lr=1e-3).result()
    session.settle()
    assert before > 0
    assert library.kept_mappings_mapped_bytes() == before


def test_rows_of_another_length_find_room_in_what_is_kept(
    library: ctypes.CDLL,
    make_session: Callable[..., Any],
    make_batch: Callable[..., Batch],
    tiny_config: ModelConfig,
) -> None:
    """Fine-tuning on rows as they come: no size comes twice, and every page is zeroed anew."""
    kept_mappings.give_back()
    deep = tiny_config.model_copy(update={"num_hidden_layers": 4})
    session = make_session(deep, micro_batch_size=72)

    def newly_mapped(*lengths: int) -> int:
        before = library.kept_mappings_mapped_bytes()
        for length in lengths:
            session.train_step(make_batch(72, length, tiny_config.vocab_size), lr=1e-3).result()
        session.settle()
        mapped: int = library.kept_mappings_mapped_bytes() - before
        return mapped

    at_first = newly_mapped(128, 122, 118)
    assert newly_mapped(120, 124, 116) < 0.1 * at_first


def test_without_a_compiler_the_heap_is_kept_and_planned(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig
) -> None:
    """A plan for memory that is not used as well as it thinks."""

    def lost() -> float:
        options = SessionOptions(OptimizerTable(name="adamw"))
        deep = tiny_config.model_copy(update={"num_hidden_layers": 20})
        costs = memory_costs(deep, options, "float32", torch.device("cpu"))
        return costs.allocator_per_token_checkpointed_bytes

    if kept_mappings.compiler() is not None:
        with_mappings = lost()
        monkeypatch.setenv("CXX", "there-is-no-such-compiler")
        assert kept_mappings.compiler() is None
        assert lost() > 3 * with_mappings
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    # Not through the cache: a process that forgets its allocator gives nothing back any more.
    assert kept_mappings.load.__wrapped__() is None
