"""The user's own classifier: any Python function, in a process of its own, within a time limit.

It judges the answer so far at the end of each sentence, which is held back until then. A process
can be ended when it hangs; a thread cannot. While it starts again the answer goes on as if it had
not been in time.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from solollm.errors import ConfigError
from solollm.guard.notices import Notices
from solollm.guard.settings import ClassifierTable
from solollm.serving.text_filter import HeldFilter

_PAUSE_SECONDS = 1.0  # between starts that fail
_SEEN_CHARS = 4000  # of the answer, its end
_SENTENCE = re.compile(r"[.!?\u3002]+[\s\"')\u201d]|\n")
_MAX_SENTENCE = 300
_PROGRAM = """\
import importlib, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the function prints is no answer
sys.path.insert(0, os.getcwd())
try:
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    print(json.dumps({"ready": True}), file=answers, flush=True)
except BaseException as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
    raise SystemExit(1)
for line in sys.stdin:
    print(json.dumps({"score": float(function(json.loads(line)))}), file=answers, flush=True)
"""


class Classifier:
    """The process around a function. Use from any thread; `close` when done."""

    def __init__(self, table: ClassifierTable) -> None:
        """Raises ConfigError if the function cannot be loaded."""
        self._table = table
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._is_closed = False
        self._is_starting = False
        error = self._start()
        if error:
            self.close()
            raise ConfigError(
                f"the classifier {table.function!r} cannot be loaded", why=error,
                fix="name it as module:function, importable from the working directory",
            )  # fmt: skip

    def is_bad(self, text: str) -> bool | None:
        """Its judgement of a text; None if that did not come in time."""
        deadline = time.monotonic() + self._table.timeout_seconds
        if not self._lock.acquire(timeout=self._table.timeout_seconds):
            return None
        try:
            process = self._process
            if process is None or process.stdin is None or self._is_starting:
                return None
            try:
                process.stdin.write(json.dumps(text).encode() + b"\n")
                process.stdin.flush()
                answer = self._read(deadline)
            except (OSError, ValueError):
                answer = None
            if answer is not None and "score" in answer:
                return float(str(answer["score"])) >= self._table.threshold
            self._is_starting = True
            threading.Thread(target=self._restart, daemon=True).start()
            return None
        finally:
            self._lock.release()

    def close(self) -> None:
        self._is_closed = True
        self._end()

    def _start(self) -> str:
        """Start the process and wait for it; what went wrong, or nothing."""
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, self._table.function],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        answer = self._read(time.monotonic() + self._table.start_seconds)
        if answer is None:
            return f"it was not ready within {self._table.start_seconds:g} seconds"
        return str(answer.get("error", ""))

    def _restart(self) -> None:
        self._end()
        while not self._is_closed and self._start():
            self._end()
            time.sleep(_PAUSE_SECONDS)
        self._is_starting = False
        if self._is_closed:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was never flushed goes nowhere
                    continue
        process.wait()

    def _read(self, deadline: float) -> dict[str, object] | None:
        """The next answer; None if it does not come in time, or never."""
        assert self._process is not None
        assert self._process.stdout is not None
        number = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([number], [], [], left)[0]:
                return None
            part = self._process.stdout.read1(65536)  # type: ignore[attr-defined]
            if not part:
                return None
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        found = json.loads(line)
        return found if isinstance(found, dict) else None


class ClassifierFilter(HeldFilter):
    """Asks a classifier about the answer at the end of each sentence."""

    is_slow = True  # it waits for another process

    def __init__(
        self, is_bad: Callable[[str], bool | None], notices: Notices, *, late_is_bad: bool
    ) -> None:
        self._is_bad = is_bad
        self._notices = notices
        self._late_is_bad = late_is_bad
        self._shown = ""

    def _advance(self, *, is_last: bool) -> str:
        shown: list[str] = []
        while self._held and not self.stopped:
            end = self._sentence_end()
            if end is None and not is_last:
                break
            sentence, self._held = self._held[:end], self._held[end:] if end else ""
            self._shown = (self._shown + sentence)[-_SEEN_CHARS:]
            shown.append(self._judged(sentence))
        return "".join(shown)

    def _sentence_end(self) -> int | None:
        found = _SENTENCE.search(self._held, 0, _MAX_SENTENCE)
        if found is not None:
            return found.end()
        return _MAX_SENTENCE if len(self._held) >= _MAX_SENTENCE else None

    def _judged(self, sentence: str) -> str:
        verdict = self._is_bad(self._shown)
        if verdict is None:
            self._notices.note(
                "classifier", "not in time", "block" if self._late_is_bad else "warn"
            )
            verdict = self._late_is_bad
        elif verdict:
            self._notices.note("classifier", "found", "block")
        if verdict:
            self.stopped = "content_filter"
            return ""
        return sentence
