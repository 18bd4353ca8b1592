"""The load generator: what it counts, and where it may send."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from solollm.errors import BackendError, ConfigError
from solollm.serving.benchmark import bench_serve
from solollm.serving.load import Load, LoadResult, Seen, Target, run_load


def test_figures_are_those_of_the_requests() -> None:
    """Goodput of requests that missed their goal, or percentiles of something else."""
    quick = Seen(0.1, (0.01, 0.03), 0.14, 3)
    late = Seen(1.5, (0.01,), 1.51, 2)
    slow = Seen(0.2, (0.5, 0.5), 1.2, 3)
    result = LoadResult(Load(3), 2.0, 0.5, (quick, late, slow))
    assert result.tokens == 8
    assert result.tokens_per_second == 4
    assert result.tokens_per_cpu_second == 16
    assert result.goodput == 0.5
    assert (result.first(0.5), result.first(0.95)) == (0.2, 1.5)
    assert result.gap(0.0) == 0.01


@pytest.mark.parametrize("url", ["http://10.0.0.1:80", "http://example.com", "http://0.0.0.0:1"])
def test_load_goes_nowhere_else(url: str) -> None:
    """A benchmark pointed at somebody else's server."""
    with pytest.raises(ConfigError, match="not this machine"):
        run_load(Target(url, "m"), Load(1), ["x"], cpu_seconds=lambda: 0.0)
    with pytest.raises(ConfigError, match="users"):
        run_load(Target("http://localhost", "m"), Load(10_000), ["x"], cpu_seconds=lambda: 0.0)


def test_a_load_is_sent_and_seen(serving: Callable[..., Any]) -> None:
    """Users that wait for each other, tokens counted twice, or an answer taken for whole."""
    server = serving("torch")
    before = server.metric("solollm_new_tokens_total")
    load = Load(users=4, requests_per_user=3, new_tokens=6)
    prompts = [f"value {n}" for n in range(12)]
    result = run_load(Target(server.url, "tiny"), load, prompts, cpu_seconds=lambda: 0.0)
    assert len(result.seen) == 12
    assert result.tokens == server.metric("solollm_new_tokens_total") - before
    assert all(0 < seen.first_seconds <= seen.seconds for seen in result.seen)
    assert result.to_json()["users"] == 4


class _Busy(BaseHTTPRequestHandler):
    """A server whose first connections are reset before they are answered."""

    resets = 2

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if _Busy.resets:
            _Busy.resets -= 1
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        self.send_response(200)
        self.end_headers()
        for text in ("a", "b"):
            event = {"choices": [{"index": 0, "text": text}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_: Any) -> None:
        pass


def test_a_reset_connection_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that ends because a server with a short queue let one of 64 users wait; or one
    that does not say so."""
    monkeypatch.setattr("solollm.serving.load._RETRY_SECONDS", 0.05)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = Target(f"http://127.0.0.1:{server.server_port}", "m")
        result = run_load(target, Load(1), ["x"], cpu_seconds=lambda: 0.0)
        assert [seen.text for seen in result.seen] == ["ab", "ab"]
        assert result.to_json()["retries"] == 2
        assert result.first(1.0) > 0.1
        _Busy.resets = 100
        with pytest.raises(BackendError, match="sent 5 times"):
            run_load(target, Load(1), ["x"], cpu_seconds=lambda: 0.0)
        server.shutdown()


def test_what_is_not_here_is_said(served_checkpoint: Path) -> None:
    """A stack left out without a word, and prompts that fill the whole context."""
    with pytest.raises(ConfigError, match="no stack"):
        bench_serve(served_checkpoint, stacks=["vlm"], tell=print)
    with pytest.raises(ConfigError, match="do not fit"):
        bench_serve(served_checkpoint, load=Load(1, new_tokens=600), tell=print)


@pytest.mark.slow
def test_the_benchmark_runs_on_every_stack_that_starts(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    """A stack that starts for its own users alone, or one whose start ends the others' results."""
    python = tmp_path / "bin" / "python"
    for folder in (python.parent, tmp_path / "lib" / "python3.12" / "site-packages" / "vllm"):
        folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    python.write_text("#!/bin/sh\necho no libraries; exit 1\n")
    python.chmod(0o755)
    measured = bench_serve(served_checkpoint, users=(1, 8), vllm_python=python, tell=print)
    assert "no libraries" in measured.missing.pop("vllm")
    assert not measured.missing
    assert measured.stacks
    for name, results in measured.stacks.items():
        assert [len(result.seen) for result in results] == [2, 16]
        assert measured.scaling(name, 8) > 0
        assert measured.agreement(name) > 0.9
