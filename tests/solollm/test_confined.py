"""The confined child: whatever a function does in it, the caller lives and is told."""

from __future__ import annotations

import signal

import pytest

from solollm.confined import Confined
from solollm.errors import IntegrityError


@pytest.mark.parametrize(
    ("target", "request_", "seconds", "reason"),
    [
        ("time:sleep", 60, 0.1, "took longer than 1 seconds"),
        ("builtins:exec", "while True: pass", 0.5, "computed for longer than 0.5 seconds"),
        ("os:_exit", 3, 20, "code 3"),
        ("os:abort", None, 20, "TypeError"),
        ("sys:exit", "bye", 20, "SystemExit"),
        ("os:urandom", 150_000_000, 20, "more than 100,000,000 bytes of memory"),
        ("builtins:bytearray", 9_000_000_000, 20, "MemoryError"),
        ("builtins:complex", 1, 20, "not JSON serializable"),
    ],
)
def test_whatever_the_function_does_becomes_an_error(
    target: str, request_: object, seconds: float, reason: str
) -> None:
    """A hang, an exit, a crash or a flood of memory ends in one kind of error."""
    child = Confined(target, seconds=seconds, memory_bytes=100_000_000)
    with child, pytest.raises(IntegrityError, match=reason):
        child.ask(request_)


def test_a_large_parent_does_not_count_against_its_child() -> None:
    """Linux hands the peak memory of a process on to what it starts: a trainer that holds
    gigabytes would have every child killed at birth."""
    ours = b"x" * 200_000_000
    with Confined("time:sleep", seconds=20, memory_bytes=100_000_000) as child:
        assert child.ask(0.2) is None
    assert len(ours) == 200_000_000


def test_a_closed_child_is_gone() -> None:
    """Neither zombies nor open pipes may pile up in a server."""
    child = Confined("builtins:len", seconds=5)
    assert child.ask("four") == 4
    process = child._child
    assert process is not None
    child.close()
    assert process.returncode == -signal.SIGKILL
    assert process.stdout is not None
    assert process.stdout.closed
