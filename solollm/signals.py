"""SIGINT and SIGTERM as a polite request: the loop finishes its step, saves, then stops.

A second one ends the process at once. SIGHUP (the terminal was closed) does not end a run. Python
allows handlers in the main thread only; elsewhere nothing is installed and nothing is asked.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager; `signal_number` is None until SIGINT or SIGTERM came."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[
            int, Any
        ] = {}  # what signal.getsignal returns, a union of private types

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                self._previous[number] = signal.signal(number, self._handle)
            if hasattr(signal, "SIGHUP"):
                self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: installed by C code and not known to Python; the default is the nearest to it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            # No clean-up on purpose: it may be what hangs. Files are safe at every instant.
            os._exit(128 + number)
        self.signal_number = number
