"""vLLM as an engine: jobs become requests to its completions API, over a socket nobody else has.

Only token ids are sent and read, so that templates, tokenizing, stop strings and tool calls are the
front's on every engine, and vLLM's other routes are out of every client's reach. `VllmEngine`
speaks to any server that answers like vLLM; who starts one is `vllm_process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import httpx

from solollm.backend import SamplingParams
from solollm.errors import BackendError
from solollm.serving.limits import Limits
from solollm.serving.token_engine import (
    Constraint,
    EngineBusy,
    EngineFailure,
    EngineInfo,
    EngineState,
    EngineUnavailable,
    JobRefused,
    QueuedStream,
    Token,
    TokenEngine,
    TokenJob,
    TokenStream,
)
from solollm.serving.vllm_process import MAX_LOGPROBS, VllmProcess

_WATCH_SECONDS = 1.0
_PROBE_SECONDS = 5.0


class VllmEngine(TokenEngine):
    """A vLLM server behind `client`.

    Args:
        model: the name it serves the base model under; empty: the first it lists.
        padding_ids: rows of the embedding that stand for no token; they are never chosen.
        child: what starts the server and starts it again; None: it is somebody else's, and only
            waited for.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        limits: Limits,
        *,
        model: str = "",
        max_batch_size: int,
        padding_ids: Sequence[int] = (),
        child: VllmProcess | None = None,
    ) -> None:
        self._client = client
        self._limits = limits
        self._model = model
        self._max_batch_size = max_batch_size
        self._bias = {i: -100.0 for i in padding_ids}
        self._child = child
        self._state: EngineState = "stopped"
        self._info: EngineInfo | None = None
        self._active = 0
        self._restarts = 0
        self._watch: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "asked before start()"
        return self._info

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def num_active(self) -> int:
        return self._active

    @property
    def num_restarts(self) -> int:
        return self._restarts

    async def start(self) -> None:
        self._state = "starting"
        if self._child is not None:
            await self._child.revive()
        await self._read_info()
        await self._try_out()
        self._state = "ready"
        self._watch = asyncio.create_task(self._keep_up())

    async def stop(self) -> None:
        self._state = "stopped"
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        await self._client.aclose()
        if self._child is not None:
            await self._child.close()

    async def open(self, jobs: Sequence[TokenJob]) -> TokenStream:
        if self._state != "ready":
            raise EngineUnavailable(f"vLLM is {self._state}", retry_after=5)
        if self._active + len(jobs) > self._max_batch_size + self._limits.max_waiting:
            raise EngineBusy(f"{self._active} sequences are under way or waiting")
        return _Stream(self, jobs)

    async def run(self, job: TokenJob, put: Callable[[Token], None]) -> None:
        """One job to its end; its tokens go to `put`. Raises as `TokenStream.next` does."""
        self._active += 1
        body = request_body(job, job.adapter or self._model, self._bias)
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise _refusal(answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    for token in tokens_of(line, job, hidden=self._bias):
                        put(token)
        except httpx.HTTPError as error:
            raise EngineUnavailable(
                f"vLLM went away ({type(error).__name__})", retry_after=5
            ) from error
        finally:
            self._active -= 1

    async def _read_info(self) -> None:
        """Raises BackendError unless it serves what it should."""
        try:
            answer = await self._client.get("/v1/models")
            cards = answer.json()["data"] if answer.status_code == 200 else []
            version = (await self._client.get("/version")).json().get("version", "of an age")
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise BackendError(
                "the server does not answer like vLLM", why=f"{type(error).__name__}: {error}",
                fix="give --engine the address of a running vLLM",
            ) from error  # fmt: skip
        bases = [card for card in cards if not card.get("parent")]
        base = next((c for c in bases if c["id"] == (self._model or c["id"])), None)
        if base is None:
            raise BackendError(
                f"that vLLM does not serve {self._model or 'any model'}",
                why=f"it serves: {', '.join(card['id'] for card in cards) or 'none'}",
            )
        self._model = base["id"]
        self._info = EngineInfo(
            name="vllm", device=f"vLLM {version}", max_seq_len=int(base["max_model_len"]),
            max_batch_size=self._max_batch_size,
            adapters=tuple(card["id"] for card in cards if card.get("parent")),
        )  # fmt: skip

    async def _try_out(self) -> None:
        """One token, so that the first client does not meet a server that speaks otherwise."""
        seen: list[Token] = []
        job = TokenJob((1,), 1, SamplingParams(), frozenset(), top_logprobs=1)
        try:
            await self.run(job, seen.append)
        except (EngineUnavailable, JobRefused, EngineFailure) as error:
            raise BackendError("vLLM does not complete token ids", why=str(error)) from error
        if not any(token.id >= 0 for token in seen):
            raise BackendError(
                "the server does not return token ids",
                why="it ignores `return_token_ids`", fix="use vLLM 0.11 or newer",
            )  # fmt: skip

    async def _keep_up(self) -> None:
        """Notice when it goes, and bring it back."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if await self._is_well():
                continue
            self._state = "down"
            with contextlib.suppress(BackendError):
                if self._child is not None:
                    await self._child.revive()
                await self._read_info()
                self._restarts += 1
                self._state = "ready"

    async def _is_well(self) -> bool:
        try:
            answer = await self._client.get("/health", timeout=_PROBE_SECONDS)
        except httpx.TimeoutException:
            return True  # busy, not gone: whoever waits for a token has a time limit of its own
        except httpx.HTTPError:
            return False
        return answer.status_code == 200


class _Stream(QueuedStream):
    """One HTTP stream per job."""

    def __init__(self, engine: VllmEngine, jobs: Sequence[TokenJob]) -> None:
        super().__init__(len(jobs))
        self._tasks = [
            asyncio.create_task(self._run(engine, index, job)) for index, job in enumerate(jobs)
        ]

    def stop_job(self, index: int) -> None:
        self._tasks[index].cancel()

    async def close(self) -> None:
        await super().close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, engine: VllmEngine, index: int, job: TokenJob) -> None:
        try:
            await engine.run(job, lambda token: self.put(index, token))
        except Exception as error:  # told to whoever reads the stream
            self.fail(error)
        finally:
            self.end(index)


def request_body(job: TokenJob, model: str, bias: Mapping[int, float]) -> dict[str, Any]:
    """A job as a request to vLLM's completions route."""
    sampling = job.sampling
    merged = {**bias, **job.logit_bias}
    body: dict[str, Any] = {
        "model": model, "prompt": list(job.prompt_ids), "max_tokens": job.max_new_tokens,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p,
        "top_k": sampling.top_k or -1, "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": job.penalties[0], "presence_penalty": job.penalties[1],
        "seed": sampling.seed, "stop_token_ids": sorted(job.stop_ids), "stream": True,
        "add_special_tokens": False, "return_token_ids": True, "skip_special_tokens": False,
        "logprobs": _asked_logprobs(job, bias), "return_tokens_as_token_ids": True,
    }  # fmt: skip
    if merged:
        body["logit_bias"] = {str(token): value for token, value in merged.items()}
    if job.constraint is not None:
        body["structured_outputs"] = _structured(job.constraint)
    return body


def tokens_of(line: str, job: TokenJob, *, hidden: Container[int] = ()) -> list[Token]:
    """The tokens of one line of a stream; ids in `hidden` are no alternatives. An error in the line
    is raised: JobRefused, EngineFailure."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return []
    event = json.loads(line[6:])
    if "error" in event:
        raise _told(event["error"], job)
    found: list[Token] = []
    for choice in event.get("choices", ()):
        ids: list[int] = choice.get("token_ids") or []
        logprobs = choice.get("logprobs") or {}
        values = logprobs.get("token_logprobs") or [0.0] * len(ids)
        tops = logprobs.get("top_logprobs") or [None] * len(ids)
        for token, value, top in zip(ids, values, tops, strict=False):
            likeliest = [pair for pair in _likeliest(top) if pair[0] not in hidden]
            pairs = tuple(likeliest[: job.top_logprobs])
            found.append(Token(token, float(value or 0.0), None, pairs))
        if (reason := choice.get("finish_reason")) is not None:
            found = _ended(found, reason, job)
    return found


def _ended(found: list[Token], reason: str, job: TokenJob) -> list[Token]:
    """Mark the last token as the last; a stop id is always among the tokens that end with it."""
    stops = reason == "stop"
    if found and (not stops or found[-1].id in job.stop_ids):
        return [*found[:-1], found[-1]._replace(finish_reason="stop" if stops else "length")]
    return [*found, Token(-1, 0.0, "stop" if stops else "length")]


def _likeliest(top: Mapping[str, float] | None) -> list[tuple[int, float]]:
    """vLLM's {"token_id:7": -0.1}, likeliest first."""
    pairs = [(int(name.removeprefix("token_id:")), float(v)) for name, v in (top or {}).items()]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def _asked_logprobs(job: TokenJob, hidden: Mapping[int, float]) -> int:
    """Enough that, the hidden ones taken out, there are as many as were asked for."""
    return min(MAX_LOGPROBS, job.top_logprobs + len(hidden)) if job.top_logprobs else 0


def _structured(constraint: Constraint) -> dict[str, Any]:
    if constraint.kind == "json_schema":
        return {"json": json.loads(constraint.source)}
    return {constraint.kind: constraint.source}


def _told(error: Mapping[str, Any], job: TokenJob) -> Exception:
    """An error that came inside a stream: what it says of a grammar, it says so late."""
    message = " ".join(str(error.get("message", error)).split())[:300]
    if error.get("code") != 400:
        return EngineFailure(message)
    return JobRefused(message, param="response_format" if job.constraint else None)


def _refusal(status: int, content: bytes) -> Exception:
    try:
        error = json.loads(content)
        message = str(error.get("error", error).get("message", error))[:300]
    except (ValueError, AttributeError):
        message = content[:300].decode("utf-8", "replace")
    if status == 503:
        return EngineUnavailable(message, retry_after=5)
    return JobRefused(message) if status < 500 else EngineFailure(message)
