"""A worker that dies comes back; a server that is asked to end lets answers end first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from solollm.errors import ConfigError, IntegrityError
from solollm.serving.access import AccessRules
from solollm.serving.engine_choice import EngineSettings
from solollm.serving.limits import Limits
from solollm.serving.server import ModelSource, ServeOptions, serve

LONG = {"model": "tiny", "prompt": "def", "max_tokens": 10_000, "logit_bias": {"20": 100}}
TIGHT = Limits(
    max_waiting=1, max_new_tokens=20_000, header_seconds=0.5, body_seconds=0.5, write_seconds=0.5,
    request_seconds=1.5, max_connections=40, max_body_bytes=4000,
)  # fmt: skip


def _workers(children: list[psutil.Process]) -> list[psutil.Process]:
    """The workers among these processes (a chat template's child may be there too)."""
    return [c for c in children if "solollm.serving.worker" in " ".join(c.cmdline())]


def _worker(children: list[psutil.Process]) -> psutil.Process:
    (found,) = _workers(children)
    return found


def _until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def tight(serving: Callable[..., Any]) -> Any:
    """A server with small limits."""
    return serving("torch", limits=TIGHT, max_batch_size=2)


def test_a_full_queue_is_said_at_once(tight: Any) -> None:
    """Requests that pile up without bound, or wait for ever, when more come than can be run."""
    with httpx.Client(base_url=tight.url, timeout=60) as client:
        refused = client.post("/v1/completions", json={**LONG, "n": 4})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["retry-after"]
        assert client.post("/v1/completions", json={**LONG, "n": 3, "max_tokens": 2}).is_success


def test_a_request_has_its_time(tight: Any) -> None:
    """An answer that nobody will wait for any more, waited for until it comes."""
    worker = _worker(tight.children)
    with httpx.Client(base_url=tight.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            os.kill(worker.pid, signal.SIGSTOP)
            events = list(lines)
        assert json.loads(events[-1][6:])["error"]["code"] == "timeout"
        late = client.post("/v1/completions", json=LONG)
        os.kill(worker.pid, signal.SIGCONT)
        assert late.status_code == 504
    assert tight.metric("solollm_active_sequences") == 0
    assert tight.greedy()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX:",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{",
    ],
)
def test_a_connection_that_says_nothing_is_ended(sent: bytes, tight: Any) -> None:
    """Connections that are begun and held, until there are no descriptors left."""
    answer = tight.exchange(sent)
    assert answer == b"" or b"408" in answer.split(b"\r\n")[0]


def test_connections_beyond_the_limit_are_ended(tight: Any) -> None:
    """A flood that keeps the others out after it has passed."""
    socks = [tight.connect() for _ in range(60)]
    try:
        _until(lambda: sum(_is_closed(sock) for sock in socks) >= 20, 20)
    finally:
        for sock in socks:
            sock.close()
    assert tight.greedy()


def test_a_body_at_the_limit_is_read_and_one_beyond_it_not(tight: Any) -> None:
    """A limit that is off by one, or counted in characters."""
    for size, code in ((4000, 400), (4001, 413)):
        body = b'{"x": "' + b"y" * (size - 9) + b'"}'
        assert len(body) == size
        head = {"content-type": "application/json"}
        answer = httpx.post(f"{tight.url}/v1/completions", content=body, headers=head)
        assert answer.status_code == code


def test_a_client_that_does_not_read_is_left(tight: Any) -> None:
    """Answers kept in memory for somebody who went to sleep."""
    with tight.connect() as sock:
        body = json.dumps({**LONG, "stream": True, "max_tokens": 500, "logprobs": 20, "n": 2})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        sock.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{body}".encode())
        _until(lambda: tight.metric("solollm_active_sequences") == 0, 30)


def test_a_killed_worker_fails_cleanly_and_comes_back(tight: Any) -> None:
    """Clients left hanging by a dead worker, and a server that stays dead with it."""
    text = tight.greedy()
    with httpx.Client(base_url=tight.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            killed = time.monotonic()
            _worker(tight.children).kill()
            events = list(lines)
        assert json.loads(events[-1][6:])["error"]["code"] == "engine_unavailable"
        during = client.post("/v1/completions", json=LONG)
        assert during.status_code == 503
        assert int(during.headers["retry-after"]) <= 5
        assert client.get("/health").status_code == 503
        assert client.get("/v1/models").is_success
        _until(lambda: client.get("/health").status_code == 200)
    seconds = time.monotonic() - killed
    times = max(_workers(psutil.Process().children()), key=psutil.Process.create_time).cpu_times()
    print(
        f"back after {seconds:.1f} s, the model's load included;"
        f" {times.user + times.system:.1f} s on the processor"
    )
    assert tight.metric("solollm_engine_restarts") == 1
    assert tight.greedy() == text


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(serving: Callable[..., Any]) -> None:
    """A worker that is alive and silent, which only its silence gives away."""
    server = serving("torch", limits=Limits(stall_seconds=2.0), max_batch_size=2)
    text = server.greedy()
    worker = _worker(server.children)
    os.kill(worker.pid, signal.SIGSTOP)
    answer = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60)
    assert answer.status_code == 503
    _until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert server.greedy() == text


@pytest.fixture
def process(served_checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`solollm serve` as a user starts it, and its address. Without the guard, which ends the loops
    that a random model writes."""
    command = [
        sys.executable, "-m", "solollm", "serve", f"tiny={served_checkpoint}", "--port", "0",
        "--backend", "torch", "--guard", "off", "--json",
    ]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    yield child, json.loads(child.stdout.readline())["url"]
    child.kill()
    child.wait()
    child.stdout.close()
    child.stderr.close()


def test_sigterm_lets_an_answer_end_and_leaves_nothing(
    process: tuple[subprocess.Popen[str], str],
) -> None:
    """Answers cut off by a restart of the service; workers that outlive their server."""
    child, url = process
    worker = _worker(psutil.Process(child.pid).children())
    with httpx.Client(base_url=url, timeout=60) as client:
        body = {**LONG, "stream": True, "max_tokens": 300}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            child.send_signal(signal.SIGTERM)
            events = list(lines)
    assert events[-1] == "data: [DONE]"
    assert len(events) >= 300
    assert child.wait(60) == -signal.SIGTERM
    _until(lambda: not worker.is_running(), 20)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.slow
def test_a_worker_ends_with_its_server(process: tuple[subprocess.Popen[str], str]) -> None:
    """A model that stays in memory after its server was killed."""
    child, _ = process
    worker = _worker(psutil.Process(child.pid).children())
    child.kill()
    _until(lambda: not worker.is_running(), 20)


def test_a_model_that_cannot_be_served_is_an_error(tmp_path: Path, served_checkpoint: Path) -> None:
    """A server that starts, and restarts, and restarts, for a model that never loads."""
    options = ServeOptions(access=AccessRules(), port=0, engines=EngineSettings(backend="torch"))
    with pytest.raises(ConfigError):
        serve([ModelSource(tmp_path)], options, on_ready=lambda _: None)
    with pytest.raises(ConfigError, match="called"):
        serve([ModelSource(served_checkpoint)] * 2, options, on_ready=lambda _: None)
    for path in served_checkpoint.iterdir():
        if path.name != "manifest.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(IntegrityError):
        serve([ModelSource(tmp_path)], options, on_ready=lambda _: None)
    assert threading.active_count() < 50


def _is_closed(sock: Any) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
