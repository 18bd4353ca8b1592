"""One function in a child process that may hang, eat memory or crash without harm to us.

For work on files that others made: rendering a foreign chat template, the first load of a foreign
tokenizer. The child dies by an alarm after its seconds, and when it holds too much memory; a
request and its answer are one line of JSON each. Its seconds are those of the processor, because a
busy machine makes a good file slow; who waits instead of computing has a few times as many.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from types import TracebackType
from typing import Any

import psutil

from solollm.errors import IntegrityError

_START_SECONDS = 60.0
_WAIT_FACTOR = 10  # of the clock, for each second on the processor
_TOO_MUCH_MEMORY = 77  # exit code


class Refusal(Exception):
    """Raised by the confined function: its message is for the user who asked."""


class Confined:
    """A child that answers requests with `target`, "module:function", JSON in and JSON out.

    It starts with the first request and again after it died; `close` (or a `with` block) ends it.
    """

    def __init__(self, target: str, *, seconds: float, memory_bytes: int = 1 << 30) -> None:
        arguments = f"{target!r}, {seconds!r}, {memory_bytes!r}"
        program = f"from solollm.confined import main; main({arguments})"
        self._command = [sys.executable, "-P", "-c", program]
        self._causes = {
            -signal.SIGPROF: f"it computed for longer than {seconds:g} seconds",
            -signal.SIGALRM: f"it took longer than {_WAIT_FACTOR * seconds:g} seconds",
            _TOO_MUCH_MEMORY: f"it took more than {memory_bytes:,} bytes of memory",
        }
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, request: object) -> Any:
        """What `target(request)` returned.

        Raises:
            Refusal: raised by the function itself.
            IntegrityError: the function failed, took too long or too much memory, or crashed.
        """
        with self._lock:
            reply = self._exchange(json.dumps(request).encode() + b"\n")
        if "refusal" in reply:
            raise Refusal(reply["refusal"])
        if "failure" in reply:
            raise IntegrityError("a foreign file does not work", why=reply["failure"])
        return reply["value"]

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._finalizer()
            self._child = None

    def __enter__(self) -> Confined:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _exchange(self, line: bytes) -> dict[str, Any]:
        if self._child is None:
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._finalizer = weakref.finalize(self, _end, self._child)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(line)
            self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if answer:
            reply: dict[str, Any] = json.loads(answer)
            return reply
        child = self._child
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)  # it is dying: its own exit code tells why
        self.close()
        raise IntegrityError(
            "a foreign file was stopped in its child process",
            why=self._causes.get(child.returncode, f"it crashed with code {child.returncode}"),
            fix="use the files of a publisher you trust",
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill and reap, so that neither a process nor a pipe is left."""
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def main(target: str, seconds: float, memory_bytes: int) -> None:
    """The child: answer the lines on standard input until it closes."""
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _START_SECONDS)
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the function prints goes nowhere
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; the guard serves
        address_space = memory_bytes + (1 << 30)  # libraries map more than they use
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    threading.Thread(target=_guard_memory, args=(memory_bytes,), daemon=True).start()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, _WAIT_FACTOR * seconds)
        reply = _reply(function, line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        output.write(reply.encode() + b"\n")
        output.flush()


def _reply(function: Any, line: bytes) -> str:
    try:
        return json.dumps({"value": function(json.loads(line))})
    except Refusal as refusal:
        return json.dumps({"refusal": str(refusal)})
    except BaseException as error:  # panics of Rust libraries are no Exceptions
        return json.dumps({"failure": f"{type(error).__name__}: {error!s:.500}"})


def _guard_memory(memory_bytes: int) -> None:
    process = psutil.Process()  # not getrusage: its peak is partly that of our parent
    while process.memory_info().rss <= memory_bytes:
        time.sleep(0.01)
    os._exit(_TOO_MUCH_MEMORY)
