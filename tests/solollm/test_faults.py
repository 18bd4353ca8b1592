"""Failures of the machine, told from those of the run by the texts that frameworks give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from solollm.config import RunConfig
from solollm.errors import BackendError, SoloLLMError
from solollm.faults import fault_kind, noting_faults
from solollm.runs import Run

METAL = "[METAL] Command buffer execution failed: "


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "memory"),
        (OutOfMemoryError("Tried to allocate 2.00 GiB."), "memory"),
        (RuntimeError(METAL + "Insufficient Memory"
                      " (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."), "memory"),
        (RuntimeError(METAL + "Impacting Interactivity"
                      " (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"), "gpu"),
        (RuntimeError("[metal::malloc] Resource limit (499000) exceeded."), "gpu"),
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the"
                      " maximum allowed buffer size of 8 bytes."), "memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't"
                      " allocate memory: you tried to allocate 4 bytes."), "memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "gpu"),
        (RuntimeError("shapes do not match"), None),
        (SoloLLMError("10 steps in a row were not finite"), None),
    ],
)  # fmt: skip
def test_faults_are_told_apart(error: Exception, kind: str | None) -> None:
    """A bug restarted for ever; a machine's fault that ends a week's run."""
    assert fault_kind(error) == kind


def test_the_cause_of_an_error_counts() -> None:
    """A fault hidden under the error that a library makes of it."""
    error = BackendError("the step failed")
    error.__cause__ = MemoryError()
    assert fault_kind(error) == "memory"


def test_a_fault_is_written_down_and_goes_on_its_way(tmp_path: Path) -> None:
    """A fault swallowed, or not found by the supervisor."""
    run = Run.create(tmp_path / "run", RunConfig())
    with pytest.raises(RuntimeError), noting_faults(run):
        raise RuntimeError(METAL + "Caused GPU Timeout Error\nand more")
    (event,) = run.read_events()
    assert (event["kind"], event["fault"]) == ("fault", "gpu")
    assert event["error"] == METAL + "Caused GPU Timeout Error"
    with pytest.raises(ValueError), noting_faults(run):
        raise ValueError
    assert len(run.read_events()) == 1
