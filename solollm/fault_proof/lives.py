"""Processes in which the program is run: what `python -m solollm` does, with a fault lying in wait.

Every life is a real process with its own exit code, and what it says goes into a file. It is forked
from one that has imported the framework (where that is safe), so that a life costs no import.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from solollm.resume_proof import PRELOADED

Arm = Callable[[Path], None]  # called in the process, with the mark to leave where the fault comes
StartMethod = Literal["spawn", "forkserver"]
LONGEST_SECONDS = 120.0  # of anything that is waited for
_POLL_SECONDS = 0.001
_SHOWN_CHARACTERS = 600
PROGRAM = (__name__, "solollm.commands.resume", "solollm.pretraining", "solollm.report.console")


class PromiseBroken(Exception):
    """A fault did not end as promised; the text says what was found."""


class CannotBeProvoked(Exception):
    """A fault cannot be made here; the text says why."""


class Ended(NamedTuple):
    """How a life ended: its exit code, negative for a signal, and all that it said."""

    code: int
    said: str

    @property
    def shown(self) -> str:
        """The end of what was said, on one line, for messages."""
        text = " / ".join(self.said.split("\n"))[-_SHOWN_CHARACTERS:].strip(" /")
        return text or "(nothing was said)"


class Life:
    """One process of the program, which runs until it is waited for or killed."""

    def __init__(self, process: Any, output: Path, mark: Path) -> None:
        self.mark = mark
        self._process, self._output = process, output

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def said(self) -> str:
        """All that it has printed so far, errors too."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def end(self) -> Ended:
        """Wait for its end."""
        self._process.join(LONGEST_SECONDS)
        if self._process.exitcode is None:
            raise PromiseBroken(f"a process has not ended in {LONGEST_SECONDS:.0f} s")
        return Ended(int(self._process.exitcode), self.said())

    def wait_until(self, condition: Callable[[], object], what: str) -> bool:
        """Wait for `condition`; False where the process has ended before it came about."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while not condition():
            if not self._process.is_alive():
                return bool(condition())
            if time.monotonic() > deadline:
                raise PromiseBroken(f"{what} did not come about in {LONGEST_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
        return True

    def children(self) -> list[psutil.Process]:
        """The processes that it has started and that live."""
        try:
            return psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return []

    def release(self) -> None:
        """Let a process go on that `arming.hold_at_row` has stopped."""
        go_sign(self.mark).touch()

    def kill(self) -> None:
        """End it, and what it has started."""
        started = self.children()
        self._process.kill()
        self._process.join()
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


class Nursery:
    """Where the processes come from. `preloaded`: modules that they are forked with."""

    def __init__(
        self, start_method: StartMethod, preloaded: Sequence[str] = (*PRELOADED, *PROGRAM)
    ) -> None:
        self._context: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            self._context.set_forkserver_preload(list(preloaded))

    @contextlib.contextmanager
    def life(self, words: Sequence[str], place: Path, arm: Arm | None) -> Iterator[Life]:
        """`solollm` with these words, which speaks into a file at `place`; dead when this is
        left."""
        mark = place.with_suffix(".reached")
        output = place.with_suffix(".txt")
        arguments = (list(words), output, arm, mark)
        process = self._context.Process(target=_live, args=arguments)
        process.start()
        life = Life(process, output, mark)
        try:
            yield life
        finally:
            life.kill()


def go_sign(mark: Path) -> Path:
    """The file whose appearance lets a held process go on."""
    return mark.with_suffix(".go")


def _live(words: list[str], output: Path, arm: Arm | None, mark: Path) -> None:
    """The body of a process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.environ["NO_COLOR"] = "1"
    if arm is not None:
        arm(mark)
    sys.argv = ["solollm", *words]
    runpy.run_module("solollm", run_name="__main__")
