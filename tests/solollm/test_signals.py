"""Signals: asked once, the loop is told; asked twice, the process ends; then all is as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from solollm.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_handlers_are_restored(number: signal.Signals) -> None:
    """Guards against a run that dies in the middle of a step, or leaves its handlers behind."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with StopRequest() as stop:
        assert stop.signal_number is None
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
    assert {n: signal.getsignal(n) for n in before} == before


def test_handlers_are_restored_after_an_error() -> None:
    """Guards against Ctrl-C that does nothing any more once a training has failed."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) == before


def test_a_closed_terminal_does_not_end_the_run() -> None:
    """Guards against a night's training lost because a window was closed."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal_number is None


def test_outside_the_main_thread_nothing_is_installed() -> None:
    """Guards against ValueError for users who train from a notebook's worker thread."""
    seen: list[object] = []

    def body() -> None:
        with StopRequest() as stop:
            seen.append((stop.signal_number, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_the_process_at_once(number: signal.Signals, code: int) -> None:
    """Guards against a save that hangs and can only be ended by kill -9."""
    script = (
        "import os, signal, sys\n"
        "from solollm.signals import StopRequest\n"
        "with StopRequest():\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)}); print('asked', flush=True)\n"
        f"        os.kill(os.getpid(), {int(number)}); print('still here')\n"
        "    finally:\n"
        "        print('cleaning up')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "asked\n")
