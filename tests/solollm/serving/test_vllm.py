"""What is vLLM's side of serving, as far as it can be tested without it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from solollm.backend import SamplingParams
from solollm.errors import BackendError, ConfigError
from solollm.serving import vllm_environment
from solollm.serving.access import AccessRules
from solollm.serving.engine_choice import EngineSettings, choose_engine
from solollm.serving.server import ModelSource, ServeOptions, serve
from solollm.serving.token_engine import Constraint, EngineFailure, JobRefused, TokenJob
from solollm.serving.vllm_engine import request_body, tokens_of
from solollm.serving.vllm_process import VllmSettings, command_line, environment

JOB = TokenJob((0, 5), 8, SamplingParams(), frozenset({1, 6}), top_logprobs=2)


def _line(**choice: Any) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "finish_reason": None, **choice}]})


def test_it_listens_on_a_socket_alone() -> None:
    """vLLM on an address of the machine, where its routes without a key are open to everyone."""
    settings = VllmSettings(python=Path("/x/bin/python"), max_seq_len=256, max_batch_size=4)
    words = command_line(settings, Path("/m"), Path("/s"))
    assert words[words.index("--uds") + 1] == "/s"
    assert not {"--host", "--port", "--trust-remote-code"} & set(words)
    assert "--disable-fastapi-docs" in words


def test_adapters_are_named_with_the_largest_rank(tmp_path: Path) -> None:
    """An adapter that vLLM refuses at its start because its rank was not announced."""
    for name, rank in (("a", 4), ("b", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    adapters = {name: tmp_path / name for name in ("a", "b")}
    settings = VllmSettings(python=Path("p"), max_seq_len=8, adapters=adapters)
    words = command_line(settings, Path("m"), Path("s"))
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert f"a={tmp_path / 'a'}" in words
    assert words[words.index("--max-loras") + 1] == "2"
    on_processor = command_line(replace(settings, memory_bytes=1 << 30), Path("m"), Path("s"))
    assert on_processor[on_processor.index("--max-loras") + 1] == "3"
    (tmp_path / "c").mkdir()
    broken = VllmSettings(python=Path("p"), max_seq_len=8, adapters={"c": tmp_path / "c"})
    with pytest.raises(ConfigError, match="PEFT"):
        command_line(broken, Path("m"), Path("s"))


def test_its_environment_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our packages on its path, our key in its hands, or its reports on the network."""
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("SOLOLLM_API_KEY", "secret")
    given = environment(VllmSettings(python=Path("p"), max_seq_len=8))
    assert "PYTHONPATH" not in given
    assert "secret" not in given.values()
    assert given["VLLM_NO_USAGE_STATS"] == given["HF_HUB_OFFLINE"] == "1"


def test_nothing_is_left_of_it_when_its_server_is_killed(
    tmp_path: Path, served_checkpoint: Path
) -> None:
    """A card's memory held by a vLLM whose server is gone, until somebody looks for it."""
    python, pids = tmp_path / "python", tmp_path / "pids"
    python.write_text(f"#!/bin/sh\nsleep 600 &\necho $$ $! $PWD > {pids}.new\n"
                      f"mv {pids}.new {pids}; wait\n")  # fmt: skip
    python.chmod(0o755)
    program = (
        "import asyncio, sys; from pathlib import Path\n"
        "from solollm.serving.vllm_process import VllmProcess, VllmSettings\n"
        "settings = VllmSettings(python=Path(sys.argv[1]), max_seq_len=8)\n"
        "asyncio.run(VllmProcess(Path(sys.argv[2]), settings).revive())"
    )
    with subprocess.Popen([sys.executable, "-c", program, python, served_checkpoint]) as server:
        _until(pids.exists)
        *both, folder = pids.read_text().split()
        server.kill()
    _until(lambda: not any(_is_alive(int(pid)) for pid in both))
    _until(lambda: not Path(folder).exists())


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_job_becomes_a_request_of_token_ids() -> None:
    """A bias of the client that lifts the ban on padding rows, or a prompt sent as text."""
    job = TokenJob(
        (0, 5), 8, SamplingParams(top_k=3), frozenset({6, 1}), logit_bias={9: 2.0},
        constraint=Constraint("json_schema", '{"type": "object"}'),
    )  # fmt: skip
    body = request_body(job, "base", {310: -100.0})
    assert body["prompt"] == [0, 5]
    assert body["logit_bias"] == {"310": -100.0, "9": 2.0}
    assert body["stop_token_ids"] == [1, 6]
    assert body["structured_outputs"] == {"json": {"type": "object"}}
    assert body["top_k"] == 3
    assert request_body(JOB, "base", {})["top_k"] == -1


def test_lines_become_tokens() -> None:
    """Tokens without their log-probabilities, or an end that is not seen."""
    logprobs = {
        "token_logprobs": [-0.5, -1.5],
        "top_logprobs": [{"token_id:7": -0.5, "token_id:8": -1.0, "token_id:9": -2.0}, None],
    }
    first, second = tokens_of(_line(token_ids=[7, 9], logprobs=logprobs), JOB)
    assert first[:2] == (7, -0.5)
    assert first.alternatives == ((7, -0.5), (8, -1.0))
    assert second.logprob == -1.5
    (end,) = tokens_of(_line(token_ids=[6], finish_reason="stop"), JOB)
    assert (end.id, end.finish_reason) == (6, "stop")
    (length,) = tokens_of(_line(token_ids=[7], finish_reason="length"), JOB)
    assert (length.id, length.finish_reason) == (7, "length")
    (bare,) = tokens_of(_line(token_ids=[], finish_reason="length"), JOB)
    assert (bare.id, bare.finish_reason) == (-1, "length")
    assert tokens_of("data: [DONE]", JOB) == tokens_of(": ping", JOB) == []
    with pytest.raises(EngineFailure, match="dead"):
        tokens_of('data: {"error": {"message": "dead", "code": 500}}', JOB)
    with pytest.raises(JobRefused):
        tokens_of('data: {"error": {"message": "bad grammar", "code": 400}}', JOB)


def test_the_choice_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who does not know why their card idles."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("solollm.serving.engine_choice.nvidia_gpus", lambda: ())
    assert "CUDA" in choose_engine(EngineSettings()).reason
    with pytest.raises(ConfigError, match="not installed"):
        choose_engine(EngineSettings(engine="vllm"))
    with pytest.raises(ConfigError, match="`vllm`"):
        choose_engine(EngineSettings(engine="vlm"))
    with pytest.raises(ConfigError, match="no Python that has vLLM"):
        choose_engine(EngineSettings(vllm_python=tmp_path / "python"))
    attached = choose_engine(EngineSettings(engine="http://127.0.0.1:9"))
    assert (attached.kind, attached.url) == ("attached", "http://127.0.0.1:9")

    class Card:
        name = "RTX 4090"

    monkeypatch.setattr("solollm.serving.engine_choice.nvidia_gpus", lambda: (Card(),))
    assert "engines install vllm" in choose_engine(EngineSettings()).reason
    folder = tmp_path / "solollm" / "engines" / "vllm"
    _fake_environment(folder, "vllm")
    assert choose_engine(EngineSettings()).kind == "builtin"  # not finished: it has no stamp
    (folder / "solollm-vllm").write_text("")
    assert choose_engine(EngineSettings()).kind == "vllm"


def test_vllm_metal_is_seen_on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-metal, installed by its own script, and not found."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    _fake_environment(tmp_path / ".venv-vllm-metal", "vllm_metal")
    assert vllm_environment.find_vllm() is None
    monkeypatch.setattr("solollm.serving.vllm_environment._is_apple_silicon", lambda: True)
    choice = choose_engine(EngineSettings(engine="vllm"))
    assert choice.vllm is not None
    assert choice.vllm.origin == "vllm-metal"
    assert "vllm-metal" in choose_engine(EngineSettings()).reason


def _fake_environment(folder: Path, package: str) -> None:
    for path in (folder / "bin", folder / "lib" / "python3.12" / "site-packages" / package):
        path.mkdir(parents=True)
    (path / "__init__.py").write_text("")
    python = folder / "bin" / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)


class _Stranger(BaseHTTPRequestHandler):
    """A server that is no vLLM."""

    def do_GET(self) -> None:
        body = b'{"data": [{"id": "m", "max_model_len": 64}], "version": "1"}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = b'data: {"choices": [{"index": 0, "text": "hi", "finish_reason": "length"}]}\n\n'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Stranger)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_that_is_no_vllm_is_refused(stranger: str, served_checkpoint: Path) -> None:
    """A server attached to whose answers make no sense only when the first client asks."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for address, message in ((stranger, "token ids"), (f"http://127.0.0.1:{port}", "like vLLM")):
        options = ServeOptions(AccessRules(), port=0, engines=EngineSettings(engine=address))
        with pytest.raises(BackendError, match=message):
            serve([ModelSource(served_checkpoint, "m")], options, on_ready=lambda _: None)
