"""Bodies in and responses out: what every route does the same way."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from solollm.errors import nearest
from solollm.serving.api_errors import ApiError, invalid
from solollm.serving.limits import Limits
from solollm.strictfile import strict_json

_Model = TypeVar("_Model", bound=BaseModel)
_T = TypeVar("_T")
_DISCARDED_BYTES, _DISCARD_SECONDS = 64 << 20, 2.0
ABORT = "abort_connection"  # in the connection's state: ends it without flushing


def json_response(
    document: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    content = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(content, status, dict(headers or {}), "application/json")


async def read_request(request: Request, schema: type[_Model], limits: Limits) -> _Model:
    """The body, within its limits, as `schema`. Raises ApiError for everything that is not."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, "the body must be sent as Content-Type: application/json",
            code="unsupported_media_type", closes=True,
        )  # fmt: skip
    content = await _body(request, limits)
    try:
        value = strict_json(content)
    except ValueError as error:
        raise invalid(f"the body is no JSON: {str(error)[:200]}", code="invalid_json") from None
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise _explained(error, schema) from None


async def _body(request: Request, limits: Limits) -> bytes:
    too_large = ApiError(
        413, f"a request has at most {limits.max_body_bytes:,} bytes",
        code="request_too_large", closes=True,
    )  # fmt: skip
    length = request.headers.get("content-length")
    if length is not None and "transfer-encoding" in request.headers:
        raise ApiError(
            400, "Content-Length and Transfer-Encoding exclude each other",
            code="ambiguous_length", closes=True,
        )  # fmt: skip
    if length is not None and int(length) > limits.max_body_bytes:
        await _discard(request)
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                content += part
                if len(content) > limits.max_body_bytes:
                    break
    except TimeoutError:
        raise ApiError(
            408, f"the body did not come within {limits.body_seconds:g} seconds",
            code="body_timeout", closes=True,
        ) from None  # fmt: skip
    if len(content) > limits.max_body_bytes:
        content.clear()
        await _discard(request)
        raise too_large
    return bytes(content)


async def _discard(request: Request) -> None:
    """Let a client that is still sending come to where it reads our answer, within reason."""
    left = _DISCARDED_BYTES
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    return


def _explained(error: ValidationError, schema: type[BaseModel]) -> ApiError:
    """The first problem of a body, in a sentence that names its field."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part)[:64] for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        fields = [field.alias or name for name, field in schema.model_fields.items()]
        hint = nearest(str(problem["loc"][-1])[:64], fields)
        return invalid(f"unknown field `{place}`; {hint}".rstrip("; "), place, "unknown_field")
    if problem["type"] == "missing":
        return invalid(f"`{place}` is missing", place, "missing_field")
    message = problem["msg"].removeprefix("Value error, ")
    return invalid(f"`{place}`: {message}" if place else message, place or None)


async def until_disconnect(request: Request, work: Awaitable[_T]) -> _T:
    """What `work` gives; it is cancelled when the client leaves. The body must have been read.

    Raises:
        ClientDisconnect: the client has left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


class EventStream(Response):
    """Server-sent events. When the client leaves, or does not read for too long, the source is
    closed, and with it the generation."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], limits: Limits) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._events = events
        self._limits = limits
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(scope, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending

    async def _send_all(self, scope: Scope, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for event in self._events:
                async with asyncio.timeout(self._limits.write_seconds):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            scope["state"][ABORT]()
        finally:
            await self._events.aclose()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
