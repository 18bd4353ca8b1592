"""The server's routes: OpenAI's API over a catalogue of models, one front for every engine.

Who may call is `access`; what may be asked `schemas` and `requests`; how text is made `answering`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from solollm.serving import objects
from solollm.serving.access import AccessControl, AccessRules
from solollm.serving.answering import Answer, Piece, Timing
from solollm.serving.api_errors import ApiError, invalid
from solollm.serving.catalogue import Catalogue, ServedModel
from solollm.serving.chat_page import chat_page
from solollm.serving.http import EventStream, json_response, read_request, until_disconnect
from solollm.serving.limits import Limits
from solollm.serving.metrics import Metrics
from solollm.serving.requests import Prepared, prepare_chat, prepare_completion
from solollm.serving.schemas import ChatRequest, CompletionRequest
from solollm.serving.text_filter import FilterFactory
from solollm.serving.token_engine import (
    EngineBusy,
    EngineFailure,
    EngineUnavailable,
    JobRefused,
)

_LOG = logging.getLogger("solollm.serving")
_Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Front:
    """What the routes work with. `filters`: made anew for every answer; None: no filter."""

    catalogue: Catalogue
    limits: Limits
    metrics: Metrics
    filters: FilterFactory | None = None

    async def health(self, request: Request) -> Response:
        """200 while every engine is ready, else 503: for whoever watches, hence without details."""
        states = {engine.state for engine in self.catalogue.engines.values()}
        if states == {"ready"}:
            return json_response({"status": "ok"})
        answer = {"status": "starting" if states <= {"ready", "starting"} else "down"}
        return json_response(answer, status=503, headers={"retry-after": "2"})

    async def metrics_page(self, request: Request) -> Response:
        content = self.metrics.text(self.catalogue.engines)
        return Response(content, headers={"content-type": self.metrics.content_type})

    async def models(self, request: Request) -> Response:
        cards = [_card(m) for m in self.catalogue]
        return json_response({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        found = self.catalogue.find(request.path_params["name"])
        return json_response(_card(found))

    async def page(self, request: Request) -> Response:
        """The page for people; it speaks to this server alone."""
        found = chat_page()
        return Response(found.content, headers=found.headers, media_type="text/html")

    async def chat(self, request: Request) -> Response:
        timing = Timing()
        asked = await read_request(request, ChatRequest, self.limits)
        model = self.catalogue.find(asked.model)
        self._check_up(model.root)
        prepared = await asyncio.to_thread(prepare_chat, asked, model, self.limits)
        return await self._answer(request, asked, prepared, timing)

    async def completion(self, request: Request) -> Response:
        timing = Timing()
        asked = await read_request(request, CompletionRequest, self.limits)
        model = self.catalogue.find(asked.model)
        self._check_up(model.root)
        prepared = await asyncio.to_thread(prepare_completion, asked, model, self.limits)
        return await self._answer(request, asked, prepared, timing)

    def _check_up(self, root: str) -> None:
        """No work for a request that cannot be answered now."""
        engine = self.catalogue.engines[root]
        if engine.state != "ready":
            raise unavailable(EngineUnavailable(f"the engine is {engine.state}"))

    async def _answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, prepared: Prepared,
        timing: Timing,
    ) -> Response:  # fmt: skip
        if prepared.is_scored and self.filters is not None:
            raise invalid(
                "log-probabilities would show what the guard hides; the server gives them with"
                " --guard off", "logprobs",
            )  # fmt: skip
        choices = prepared.choices(self.filters)
        stream = await prepared.model.engine.open(prepared.jobs)
        answer = Answer(stream, choices, timing)
        kind = "chatcmpl" if prepared.is_chat else "cmpl"
        head = objects.Head(
            f"{kind}-{secrets.token_hex(12)}", prepared.model.name, int(time.time()),
            prepared.is_chat,
        )  # fmt: skip
        pieces = self._watched(answer, prepared, timing, stream.close)
        if not asked.stream:
            document = self._whole(pieces, head, answer, prepared)
            return json_response(await until_disconnect(request, document))
        # An answer that fails before its first token still gets a status of its own.
        first = await until_disconnect(request, anext(pieces, []))
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        chunks = objects.Chunks(head, is_scored=prepared.is_scored, with_usage=with_usage)
        events = self._events(chunks, answer, prepared, (first, pieces))
        return EventStream(events, self.limits)

    async def _watched(
        self, answer: Answer, prepared: Prepared, timing: Timing,
        close: Callable[[], Awaitable[None]],
    ) -> AsyncGenerator[list[Piece], None]:  # fmt: skip
        """The pieces of an answer within its time, counted, and its engine's errors as ours."""
        left = self.limits.request_seconds
        ended = False
        try:
            iterator = answer.pieces()
            while True:
                async with asyncio.timeout(left - (time.monotonic() - timing.started)):
                    try:
                        pieces = await anext(iterator)
                    except StopAsyncIteration:
                        break
                yield pieces
            ended = True
        except TimeoutError:
            raise ApiError(
                504, f"the answer was not ready within {left:g} seconds", code="timeout"
            ) from None
        except (EngineUnavailable, EngineBusy, JobRefused, EngineFailure) as error:
            ended = True
            raise told(error) from error
        finally:
            await close()
            if not ended:
                self.metrics.disconnects.inc()
            name = prepared.model.name
            tokens = answer.completion_tokens
            self.metrics.answered(name, prepared.prompt_tokens, tokens, timing)

    async def _whole(
        self, pieces: AsyncGenerator[list[Piece], None], head: objects.Head, answer: Answer,
        prepared: Prepared,
    ) -> objects.Document:  # fmt: skip
        choices = [objects.WholeChoice() for _ in prepared.jobs]
        async with contextlib.aclosing(pieces):
            async for batch in pieces:
                for piece in batch:
                    choices[piece.index].add(piece)
        counts = objects.usage(prepared.prompt_tokens, answer.completion_tokens)
        return objects.whole(head, choices, counts, is_scored=prepared.is_scored)

    async def _events(
        self, chunks: objects.Chunks, answer: Answer, prepared: Prepared,
        pieces: tuple[list[Piece], AsyncGenerator[list[Piece], None]],
    ) -> AsyncGenerator[bytes, None]:  # fmt: skip
        first, rest = pieces
        async with contextlib.aclosing(rest):
            try:
                yield _event(*chunks.first(len(prepared.jobs)), *chunks.of(first))
                async for batch in rest:
                    yield _event(*chunks.of(batch))
            except ApiError as error:
                yield _event(error.body())
                return
            if chunks.with_usage:
                counts = objects.usage(prepared.prompt_tokens, answer.completion_tokens)
                yield _event(chunks.last(counts))
            yield b"data: [DONE]\n\n"


def build_app(front: Front, rules: AccessRules) -> Starlette:
    """The ASGI application; its engines are started and stopped by whoever runs it."""
    routes = [
        ("GET", "/health", front.health),
        ("GET", "/metrics", front.metrics_page),
        ("GET", "/v1/models", front.models),
        ("GET", "/v1/models/{name}", front.model),
        ("POST", "/v1/chat/completions", front.chat),
        ("POST", "/v1/completions", front.completion),
        ("GET", "/", front.page),
    ]
    return Starlette(
        routes=[
            Route(path, _counted(handler, path, front.metrics), methods=[method])
            for method, path, handler in routes
        ],
        middleware=[Middleware(AccessControl, rules=rules)],
        exception_handlers={HTTPException: _routing_error},
    )


def _counted(handler: _Handler, path: str, metrics: Metrics) -> _Handler:
    """A route whose errors are documents and whose answers are counted."""

    async def counted(request: Request) -> Response:
        try:
            response = await handler(request)
        except ApiError as error:
            response = json_response(error.body(), status=error.status, headers=error.headers())
        except (EngineUnavailable, EngineBusy) as error:
            answer = told(error)
            response = json_response(answer.body(), status=answer.status, headers=answer.headers())
        except ClientDisconnect:
            response = Response(status_code=499)  # to nobody
        except Exception:
            _LOG.exception("a bug in the server")
            answer = ApiError(500, "a bug in the server; its log has the trace", code="internal")
            response = json_response(answer.body(), status=500)
        metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return counted


def told(error: Exception) -> ApiError:
    """An engine's error as the client hears it."""
    if isinstance(error, EngineUnavailable):
        return unavailable(error)
    if isinstance(error, EngineBusy):
        return ApiError(429, f"too many requests: {error}", code="queue_full", retry_after=1)
    if isinstance(error, JobRefused):
        return invalid(str(error), error.param)
    return ApiError(500, f"the engine failed: {error}", code="engine_failure")


def unavailable(error: EngineUnavailable) -> ApiError:
    return ApiError(503, str(error), code="engine_unavailable", retry_after=error.retry_after)


async def _routing_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    problems = {
        404: ("there is nothing at this address", "not_found"),
        405: ("this method is not offered here", "method_not_allowed"),
    }
    message, code = problems.get(status, ("the request failed", "failed"))
    problem = ApiError(status, message, code=code)
    return json_response(problem.body(), status=status)


def _card(model: ServedModel) -> objects.Document:
    return objects.model_card(model.name, model.created, model.root, is_chat=model.is_chat)


def _event(*documents: Any) -> bytes:
    """Server-sent events, one per document."""
    return b"".join(
        b"data: " + json.dumps(d, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
        for d in documents
    )
