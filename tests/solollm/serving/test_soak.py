"""Ten minutes of every kind of client: what the server holds must not grow with what it served."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

SECONDS, WARM_UP_SECONDS = 600, 60
CLIENTS = 12
TEXT_THREADS = 4  # the server's pool, whose threads start when they are needed


class Held(NamedTuple):
    """What a process tree holds."""

    rss_bytes: int
    threads: int
    descriptors: int


def _held(server: Any) -> Held:
    processes = [psutil.Process(), *server.children]
    return Held(
        sum(p.memory_info().rss for p in processes),
        sum(p.num_threads() for p in processes),
        sum(p.num_fds() for p in processes),
    )


async def _client(client: httpx.AsyncClient, rng: random.Random, until: float) -> int:
    """One client after another: whole answers, streams, some left, some refused."""
    answered = 0
    while time.monotonic() < until:
        body: dict[str, Any] = {
            "model": "tiny", "prompt": f"value {rng.randrange(10**6)}", "temperature": 1,
            "max_tokens": rng.choice([1, 8, 64]), "n": rng.choice([1, 1, 2]),
        }  # fmt: skip
        kind = rng.randrange(5)
        if kind == 0:
            body["response_format"] = {"type": "regex", "pattern": f"[a-z]{{{rng.randint(1, 9)}}}"}
        if kind == 1:
            body["max_tokens"] = -1
        if kind == 2:
            body["logprobs"] = 5
        if kind > 2:
            await _stream(client, body, leave_rate=0.2 if kind == 4 else 0.0, rng=rng)
        else:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == (400 if kind == 1 else 200)
        answered += 1
    return answered


async def _stream(
    client: httpx.AsyncClient, body: dict[str, Any], *, leave_rate: float, rng: random.Random
) -> None:
    """Read a stream, leaving it at each line with this probability."""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        async for _ in answer.aiter_lines():
            if rng.random() < leave_rate:
                return


async def _load(url: str, seconds: float, seed: int) -> int:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        until = time.monotonic() + seconds
        clients = [_client(client, random.Random(seed + i), until) for i in range(CLIENTS)]
        return sum(await asyncio.gather(*clients))


@pytest.mark.slow
def test_ten_minutes_leave_memory_threads_and_descriptors_as_they_were(
    serving: Callable[..., Any],
) -> None:
    """A leak of a few kilobytes per request, which a day of use makes gigabytes."""
    server = serving("torch", max_batch_size=8)
    text = server.greedy()
    asyncio.run(_load(server.url, WARM_UP_SECONDS, 0))
    time.sleep(6)  # idle connections are closed after 5
    before = _held(server)
    answered = asyncio.run(_load(server.url, SECONDS, 1000))
    time.sleep(6)
    after = _held(server)
    print(f"{answered} requests; before {before}, after {after}")
    assert server.greedy() == text
    assert server.metric("solollm_active_sequences") == 0
    assert server.metric("solollm_engine_restarts") == 0
    assert answered > 200
    assert after.rss_bytes < 1.05 * before.rss_bytes
    assert after.threads <= before.threads + TEXT_THREADS
    assert after.descriptors <= before.descriptors + 2
    with contextlib.suppress(psutil.NoSuchProcess):
        assert all(child.is_running() for child in server.children)
