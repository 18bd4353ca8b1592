"""Messages between the server and its worker: JSON behind a length, over a Unix socket.

    add     {"op", "job", ...}          a job of `token_engine.TokenJob`
    cancel  {"op", "job"}
    ready   {"op", "info"}              the model is loaded
    fatal   {"op", "error"}             it cannot be; the worker ends
    tokens  {"op", "items"}             rows [job, id, logprob, finish reason, alternatives]
    failed  {"op", "job", "kind", "message", "param"}   the job is over: "refused" or "failure"

The first three lines of a conversation are the worker's `ready` or `fatal`; there are no replies to
`add` but its tokens, and a cancelled job may still send some.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from solollm.backend import SamplingParams
from solollm.serving.token_engine import Constraint, Token, TokenJob

_LENGTH = struct.Struct("<I")
_MAX_BYTES = 64 << 20

Message = dict[str, Any]


def packed(message: Mapping[str, Any]) -> bytes:
    """The bytes of one message."""
    content = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(content)) + content


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None when the other side has gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return _message(await reader.readexactly(_checked(length)))
    except (asyncio.IncompleteReadError, OSError, ValueError):
        return None  # ValueError: the other side is out of its mind, which is as good as gone


def receive_blocking(sock: socket.socket) -> Message | None:
    """`receive` for a worker's thread."""
    try:
        head = _exactly(sock, _LENGTH.size)
        if head is None:
            return None
        body = _exactly(sock, _checked(_LENGTH.unpack(head)[0]))
    except ConnectionError:
        return None
    return None if body is None else _message(body)


def job_message(number: int, job: TokenJob) -> Message:
    """The `add` of a job."""
    values = asdict(job)
    values["stop_ids"] = sorted(job.stop_ids)
    values["logit_bias"] = list(job.logit_bias.items())
    return {"op": "add", "job": number, **values}


def job_of(message: Message) -> TokenJob:
    """The job of an `add`."""
    constraint = message["constraint"]
    return TokenJob(
        prompt_ids=tuple(message["prompt_ids"]),
        max_new_tokens=message["max_new_tokens"],
        sampling=SamplingParams(**message["sampling"]),
        stop_ids=frozenset(message["stop_ids"]),
        penalties=(message["penalties"][0], message["penalties"][1]),
        logit_bias=dict(message["logit_bias"]),
        top_logprobs=message["top_logprobs"],
        constraint=Constraint(**constraint) if constraint else None,
        adapter=message["adapter"],
    )


def token_of(row: list[Any]) -> tuple[int, Token]:
    """(job number, token) of a row of `tokens`."""
    number, token, logprob, reason, alternatives = row
    pairs = tuple((int(i), float(value)) for i, value in alternatives)
    return number, Token(token, logprob, reason, pairs)


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    content = bytearray()
    while len(content) < count:
        part = sock.recv(min(count - len(content), 1 << 16))
        if not part:
            return None
        content += part
    return bytes(content)


def _checked(length: int) -> int:
    if length > _MAX_BYTES:
        raise ConnectionError(f"a message of {length} bytes")
    return length


def _message(content: bytes) -> Message:
    message: Message = json.loads(content)
    return message
