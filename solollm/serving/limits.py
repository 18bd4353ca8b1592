"""What one server lets a client ask for; beyond it a request is refused, not tried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, characters or tokens; times in seconds.

    Attributes:
        max_waiting: sequences beyond those the engine runs at once that may wait; then 429.
        header_seconds: from a connection's first moment to the end of a request's headers.
        body_seconds: for a request's whole body.
        request_seconds: from the end of the body to the last token, waiting included.
        write_seconds: how long a client may leave a piece of the answer unread.
        drain_seconds: what SIGTERM leaves to answers under way.
        stall_seconds: an engine with work that says nothing for so long is taken for dead.
    """

    max_body_bytes: int = 1 << 20
    max_header_bytes: int = 16 << 10
    max_connections: int = 1024
    max_messages: int = 1024
    max_new_tokens: int = 32_768
    max_choices: int = 8
    max_prompts: int = 32
    max_stops: int = 16
    max_stop_chars: int = 256
    max_logit_bias: int = 1024
    max_top_logprobs: int = 20
    max_constraint_chars: int = 64 << 10
    max_tools: int = 128
    max_waiting: int = 64
    header_seconds: float = 20.0
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    write_seconds: float = 60.0
    drain_seconds: float = 30.0
    stall_seconds: float = 180.0
