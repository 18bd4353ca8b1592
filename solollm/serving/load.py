"""Users who ask a completions server on this machine, and what they saw.

Each user sends one streamed request after the other. A connection that is refused or reset before
anything came is tried again, as OpenAI's client does, and the wait counts. Load goes to loopback or
a Unix socket alone, and is bounded in number and time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from solollm.errors import BackendError, ConfigError
from solollm.serving.access import is_loopback

MAX_USERS = 256
_REQUEST_SECONDS = 300.0
_RETRIES, _RETRY_SECONDS = 4, 0.5


@dataclass(frozen=True)
class Target:
    """A server: `url` on loopback, or any with `socket`, the path of a Unix socket; `model`: the
    name to ask for; `prefix`: what stands before every prompt there."""

    url: str
    model: str
    socket: str = ""
    prefix: str = ""

    def client(self) -> httpx.AsyncClient:
        """Raises ConfigError for an address that is not this machine's."""
        host = urlsplit(self.url).hostname or ""
        if not self.socket and not is_loopback(host):
            raise ConfigError(f"{host} is not this machine", why="load is sent nowhere else")
        limits = httpx.Limits(max_connections=MAX_USERS, max_keepalive_connections=MAX_USERS)
        transport = httpx.AsyncHTTPTransport(uds=self.socket or None, limits=limits)
        timeout = httpx.Timeout(_REQUEST_SECONDS)
        return httpx.AsyncClient(transport=transport, base_url=self.url, timeout=timeout)


@dataclass(frozen=True)
class Seen:
    """What one request was like: seconds to its first text, between texts, and in all; how often
    it had to be sent again."""

    first_seconds: float
    gap_seconds: tuple[float, ...]
    seconds: float
    tokens: int
    text: str = ""
    retries: int = 0


@dataclass(frozen=True)
class Load:
    """Users and their requests. A request is good if its first token came within
    `first_seconds_goal` and its mean gap is within `gap_seconds_goal`."""

    users: int
    requests_per_user: int = 2
    new_tokens: int = 32
    first_seconds_goal: float = 1.0
    gap_seconds_goal: float = 0.1


@dataclass(frozen=True)
class LoadResult:
    """One load on one server. Percentiles over requests (first token) and gaps (between tokens);
    `cpu_seconds` of the server's processes, 0 where they are not known."""

    load: Load
    seconds: float
    cpu_seconds: float
    seen: tuple[Seen, ...] = field(repr=False)

    @property
    def tokens(self) -> int:
        return sum(one.tokens for one in self.seen)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_second(self) -> float:
        return self.tokens / self.cpu_seconds if self.cpu_seconds else 0.0

    @property
    def goodput(self) -> float:
        """Good requests per second."""
        goals = self.load
        good = [
            one for one in self.seen
            if one.first_seconds <= goals.first_seconds_goal
            and statistics.fmean(one.gap_seconds or (0.0,)) <= goals.gap_seconds_goal
        ]  # fmt: skip
        return len(good) / self.seconds

    def first(self, share: float) -> float:
        """Seconds to the first token that this share of the requests stayed within."""
        return _quantile([one.first_seconds for one in self.seen], share)

    def gap(self, share: float) -> float:
        """Seconds between tokens that this share of the gaps stayed within."""
        return _quantile([gap for one in self.seen for gap in one.gap_seconds], share)

    def to_json(self) -> dict[str, Any]:
        return {
            "users": self.load.users, "requests": len(self.seen), "tokens": self.tokens,
            "seconds": self.seconds, "cpu_seconds": self.cpu_seconds,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_cpu_second": self.tokens_per_cpu_second, "goodput": self.goodput,
            "first_p50": self.first(0.5), "first_p95": self.first(0.95),
            "gap_p50": self.gap(0.5), "gap_p95": self.gap(0.95),
            "retries": sum(one.retries for one in self.seen),
        }  # fmt: skip


def run_load(
    target: Target, load: Load, prompts: Sequence[str], *, cpu_seconds: Callable[[], float]
) -> LoadResult:
    """Send a load and wait for all of it. `cpu_seconds`: the server's processor time so far.

    Raises:
        ConfigError: more users than are bearable, or a server elsewhere.
        BackendError: a request that was not answered.
    """
    if not 1 <= load.users <= MAX_USERS:
        raise ConfigError(f"{load.users} users: 1 to {MAX_USERS}")
    before, started = cpu_seconds(), time.monotonic()
    seen = asyncio.run(_all_users(target, load, prompts))
    return LoadResult(load, time.monotonic() - started, cpu_seconds() - before, tuple(seen))


async def _all_users(target: Target, load: Load, prompts: Sequence[str]) -> list[Seen]:
    async with target.client() as client:

        async def one_user(user: int) -> list[Seen]:
            places = range(user, user + load.users * load.requests_per_user, load.users)
            return [
                await _ask(client, target, load, prompts[place % len(prompts)]) for place in places
            ]

        each = await asyncio.gather(*(one_user(user) for user in range(load.users)))
    return [one for of_user in each for one in of_user]


async def _ask(client: httpx.AsyncClient, target: Target, load: Load, prompt: str) -> Seen:
    body = {
        "model": target.model, "prompt": target.prefix + prompt, "max_tokens": load.new_tokens,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    answer = _Answer()
    for retry in itertools.count():
        try:
            await answer.receive(client, body)
            return answer.seen(retry)
        except httpx.HTTPError as error:
            if retry == _RETRIES or answer.moments or isinstance(error, httpx.TimeoutException):
                why = f"{type(error).__name__}, sent {retry + 1} times"
                raise BackendError(f"the server did not answer: {why}") from error
            await asyncio.sleep(_RETRY_SECONDS)
    raise AssertionError("unreachable")


class _Answer:
    """A streamed answer as it comes, from the moment this is made."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._started = time.monotonic()
        self._pieces: list[str] = []
        self._tokens = 0

    async def receive(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                content = (await answer.aread())[:200]
                raise BackendError(f"the server answered {answer.status_code}: {content!r}")
            async for line in answer.aiter_lines():
                event = _event(line)
                if event.get("choices"):
                    self.moments.append(time.monotonic() - self._started)
                    self._pieces.append(event["choices"][0]["text"])
                if event.get("usage"):
                    self._tokens = int(event["usage"]["completion_tokens"])

    def seen(self, retries: int) -> Seen:
        moments = self.moments
        if not moments:
            raise BackendError("an answer came without any text")
        gaps = tuple(after - before for before, after in itertools.pairwise(moments))
        tokens = self._tokens or len(moments)
        return Seen(moments[0], gaps, moments[-1], tokens, "".join(self._pieces), retries)


def _event(line: str) -> dict[str, Any]:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return {}
    event: dict[str, Any] = json.loads(line[6:])
    if "error" in event:
        raise BackendError(f"an answer broke off: {event['error']}")
    return event


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
