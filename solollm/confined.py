"""One function in a child process that may hang, eat memory or crash without harm to us.

For work on files that others made: rendering a foreign chat template, the first load of a foreign
tokenizer. The child dies by an alarm after its seconds, and when it holds too much memory; a
request and its answer are one line of JSON each.
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

from solollm.errors import IntegrityError

_MEMORY_BYTES = 1 << 30
_START_SECONDS = 30.0
_TOO_MUCH_MEMORY = 77  # exit code
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Refusal(Exception):
    """Raised by the confined function: its message is for the user who asked."""


class Confined:
    """A child that answers requests with `target`, "module:function", JSON in and JSON out.

    It starts with the first request and again after it died; `close` (or a `with` block) ends it.
    """

    def __init__(self, target: str, *, seconds: float) -> None:
        self._command = [sys.executable, "-P", "-m", "solollm.confined", target, str(seconds)]
        self._seconds = seconds
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
        self.close()
        raise IntegrityError(
            "a foreign file was stopped in its child process",
            why=_cause(child.returncode, self._seconds),
            fix="use the files of a publisher you trust",
        )


def _cause(code: int, seconds: float) -> str:
    if code == -signal.SIGALRM:
        return f"it took longer than {seconds:g} seconds"
    if code == _TOO_MUCH_MEMORY:
        return f"it took more than {_MEMORY_BYTES:,} bytes of memory"
    return f"it crashed with code {code}"


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill and reap, so that neither a process nor a pipe is left."""
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def main(target: str, seconds: float) -> None:
    """The child: answer the lines on standard input until it closes."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _START_SECONDS)
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the function prints goes nowhere
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; the guard serves
        resource.setrlimit(resource.RLIMIT_AS, (2 * _MEMORY_BYTES, 2 * _MEMORY_BYTES))
    threading.Thread(target=_guard_memory, daemon=True).start()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply = _reply(function, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        output.write(json.dumps(reply).encode() + b"\n")
        output.flush()


def _reply(function: Any, request: object) -> dict[str, Any]:
    try:
        return {"value": function(request)}
    except Refusal as refusal:
        return {"refusal": str(refusal)}
    except BaseException as error:  # panics of Rust libraries are no Exceptions
        return {"failure": f"{type(error).__name__}: {error!s:.500}"}


def _guard_memory() -> None:
    while True:
        time.sleep(0.01)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        if used > _MEMORY_BYTES:
            os._exit(_TOO_MUCH_MEMORY)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
