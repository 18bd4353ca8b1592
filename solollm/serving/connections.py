"""HTTP connections with limits that uvicorn does not have: how many, and how long without headers.

h11 parses strictly (one Host, one length, both sane), which a server that checks them needs.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from solollm.serving.http import ABORT
from solollm.serving.limits import Limits


def protocol_class(limits: Limits) -> type[asyncio.Protocol]:
    """The class that uvicorn makes one instance of per connection."""

    class LimitedProtocol(H11Protocol):
        """Ends connections above the limit at once, and those whose headers do not come."""

        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.app_state = {**self.app_state, ABORT: transport.abort}
            if len(self.connections) > limits.max_connections:
                transport.abort()
                return
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self._stop_timer()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self._await_headers()

        def _await_headers(self) -> None:
            self._stop_timer()
            self._header_timer = self.loop.call_later(limits.header_seconds, self._give_up)

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _give_up(self) -> None:
            self.transport.abort()

    return LimitedProtocol
