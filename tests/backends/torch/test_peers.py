"""`bench train` on PyTorch: our ways to hold a model and other stacks, one and the same step."""

from __future__ import annotations

import pytest
import torch
from solollm_torch.backend import TorchBackend
from solollm_torch.process import counts_peaks
from solollm_torch.traffic import Streaming, step_traffic

from solollm.architecture import ModelConfig
from solollm.backend import Copies
from solollm.benchmark import TABLE, Work, bench_train, ways_by_name
from solollm.errors import BackendError


def test_every_way_takes_the_same_step_and_says_what_it_moved(tiny_config: ModelConfig) -> None:
    """Guards the figures of `bench train`: bytes that are the plan's and not counted, an overlap
    where nothing runs beside the computation, a way that is another computation."""
    backend, work = TorchBackend(), Work(tiny_config, 4, 48, recompute=True)
    ways = ways_by_name(backend, ("resident", "streaming", "FSDP2 offload"))
    measured = bench_train(backend, work, rounds=1, ways=ways, stacks=[])
    resident, streaming, fsdp = measured.stacks
    assert fsdp.is_same
    assert streaming.loss_deviation < 0.01, "8-bit moments"
    table = TABLE.model_copy(update={"state_bits": 8})
    formula = step_traffic(tiny_config, table, Streaming(), num_micro_batches=1)
    assert streaming.copies == Copies(formula.loaded, formula.stored)
    assert streaming.planned_copied_bytes == formula.loaded
    assert (resident.copies, fsdp.copies) == (Copies(0, 0), None)
    assert [stack.overlap for stack in measured.stacks] == [None, None, None]
    assert measured.ceilings.gemm_flops > 1e8
    assert measured.timed_peers == []


@pytest.mark.slow
def test_a_stack_takes_our_step(tiny_config: ModelConfig) -> None:
    """A comparison with another computation: other weights, other targets, another AdamW."""
    pytest.importorskip("transformers")
    measured = bench_train(
        TorchBackend(), Work(tiny_config, 4, 48), rounds=2, stacks=["transformers"]
    )
    assert [stack.is_same for stack in measured.stacks] == [True, True]
    assert measured.timed_peers == ["transformers"]


@pytest.mark.skipif(not counts_peaks(torch.device("cpu")), reason="no peaks on this system")
def test_a_peak_begins_anew() -> None:
    """The second stack of a benchmark charged with the peak of the first."""
    backend = TorchBackend()
    held = backend.memory(restart_peak=True).current_bytes
    big = torch.ones(50_000_000)
    peak = backend.memory().peak_bytes
    assert peak - held > 180_000_000
    del big
    again = backend.memory(restart_peak=True)
    assert again.peak_bytes < peak - 150_000_000


def test_ligers_stacks_say_what_they_need(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig
) -> None:
    """Triton's kernels fail on a processor inside another project's code; on a card without the
    package, under a name that nobody can install."""
    from solollm_torch import peers

    cpu, card = torch.device("cpu"), torch.device("cuda")
    for name in ("transformers+liger", "transformers+liger+compile"):
        assert peers.known_peers(cpu)[name] == "an NVIDIA card"
        monkeypatch.setattr(peers, "find_spec", lambda module: None if "liger" in module else 1)
        assert peers.known_peers(card)[name] == "liger-kernel"
        monkeypatch.setattr(peers, "find_spec", lambda module: 1)
        assert peers.known_peers(card)[name] == ""
        with pytest.raises(BackendError, match="it needs an NVIDIA card"):
            peers.make_peer(
                name, tiny_config, TABLE, seed=0, device=cpu, compute_dtype=torch.float32
            )


def test_a_stack_that_is_not_here_is_named(tiny_config: ModelConfig) -> None:
    """An ImportError from inside another project's package."""
    with pytest.raises(BackendError, match="litgpt"):
        TorchBackend().peer("litgtp", tiny_config, TABLE, seed=0)
