"""What only a real vLLM shows, beside the contract and adapters: it dies and comes back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

pytestmark = pytest.mark.vllm

PROMPT = "def number_7():"
_BACK_SECONDS = 900.0  # its own start-up, on a busy machine


def _is_well(url: str) -> bool:
    return httpx.get(f"{url}/health", timeout=60).status_code == 200


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _vllm_without_adapters() -> psutil.Process:
    """That of `serving("vllm")`: the servers of other tests have their own, which may be older."""
    children = [(child, child.cmdline()) for child in psutil.Process().children()]
    (found,) = [
        child
        for child, words in children
        if "vllm.entrypoints.openai.api_server" in words and "--enable-lora" not in words
    ]
    return found


@pytest.mark.parametrize("victim", ["its server", "its engine"])
def test_a_dead_vllm_comes_back(victim: str, serving: Callable[..., Any]) -> None:
    """A server whose vLLM was killed, and that answers 503 from then on; processes left over."""
    server = serving("vllm")
    text, restarts = server.greedy(), server.metric("solollm_engine_restarts")
    top = _vllm_without_adapters()
    (core, *_) = [child for child in top.children() if "EngineCore" in child.name()]
    killed = time.monotonic()
    (top if victim == "its server" else core).kill()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code in (500, 503)
    _until(lambda: not _is_well(server.url), 60)
    refused = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert int(refused.headers["retry-after"]) <= 5
    _until(lambda: _is_well(server.url), _BACK_SECONDS)
    print(f"back after {time.monotonic() - killed:.1f} s")
    assert server.metric("solollm_engine_restarts") == restarts + 1
    assert server.greedy() == text
    assert not core.is_running()
    assert not top.is_running() or top.status() == psutil.STATUS_ZOMBIE
