"""A real server over a tiny model: on a thread of this process, its workers in their own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import HostTensor
from solollm.checkpoint import save_checkpoint
from solollm.serving.access import AccessRules
from solollm.serving.engine_choice import EngineSettings
from solollm.serving.limits import Limits
from solollm.serving.server import Listening, ModelSource, ServeOptions, start_serving
from solollm.testing.snapshots import ArraySnapshot, state_at
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import train_tokenizer

NAME = "tiny"
_START_SECONDS = 900  # of which vLLM's CPU build takes most on a busy machine
VLLM = {"engine": "vllm", "vllm_eager": True}

# As Hermes and Qwen lay tools out, in short.
TOOL_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
<|system|>{%- for tool in tools -%}{{- tool | tojson -}}{%- endfor -%}
Write calls as <tool_call>{"name": ..., "arguments": ...}</tool_call><|end|>
{%- endif -%}
{%- for message in messages -%}
{{- '<|' + message.role + '|>' + message.content -}}
{%- for call in message.tool_calls or [] -%}<tool_call>{{- call.function | tojson -}}</tool_call>
{%- endfor -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


class RunningServer:
    """`start_serving` on a thread, until `close`."""

    def __init__(self, sources: Sequence[ModelSource], options: ServeOptions) -> None:
        self._ready: threading.Event = threading.Event()
        self._error: BaseException | None = None
        self._listening: Listening | None = None
        self._arguments = (sources, options)
        others = set(psutil.Process().children())
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(_START_SECONDS), "the server did not come up"
        if self._error is not None:
            raise self._error
        self.children = [c for c in psutil.Process().children() if c not in others]

    @property
    def url(self) -> str:
        assert self._listening is not None
        return self._listening.url

    @property
    def notes(self) -> tuple[str, ...]:
        assert self._listening is not None
        return self._listening.notes

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._until.set)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server did not end"
        if self._error is not None:
            raise self._error

    def greedy(self, prompt: str = "def number_7():", **fields: object) -> str:
        """A text that depends on the model alone."""
        body = {"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 12, **fields}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        answer.raise_for_status()
        text: str = answer.json()["choices"][0]["text"]
        return text

    def metric(self, name: str) -> float:
        """The sum over its labels of one of the server's figures."""
        page = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.M))

    def connect(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=120)

    def exchange(self, request: bytes) -> bytes:
        """What comes back for these very bytes, until the server closes."""
        received = b""
        with self.connect() as sock, contextlib.suppress(ConnectionError):
            with contextlib.suppress(OSError):  # refused before all was sent: read the answer
                sock.sendall(request)
            while part := sock.recv(65536):
                received += part
        return received

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._until = asyncio.get_running_loop(), asyncio.Event()
        sources, options = self._arguments
        await start_serving(sources, options, on_ready=self._note, until=self._until)

    def _note(self, listening: Listening) -> None:
        self._listening = listening
        self._ready.set()


@pytest.fixture(scope="session")
def served_tokenizer() -> Tokenizer:
    """300 ids (padded to 320), with a template that knows tools."""
    texts = [f"def number_{n}():\n    value = {n} + {n % 7}\n    return value\n" for n in range(40)]
    files = train_tokenizer(texts, 300).files()
    return Tokenizer({**files, "chat_template.jinja": TOOL_TEMPLATE.encode()})


@pytest.fixture(scope="session")
def served_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, served_tokenizer: Tokenizer
) -> Path:
    """A model of random weights, large enough that its tokens depend on all that came before."""
    model = ModelConfig(
        vocab_size=served_tokenizer.padded_vocab_size, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=512,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    snapshot = ArraySnapshot(model)
    for spec in parameter_table(model):
        values = rng.standard_normal(spec.shape, np.float32) * np.float32(0.15)
        snapshot.weights[spec.name] = HostTensor.of(values + np.float32(len(spec.shape) == 1))
    return save_checkpoint(
        tmp_path_factory.mktemp("served"), model=model, snapshot=snapshot, state=state_at(10),
        tokenizer_files=served_tokenizer.files(), token_ids=served_tokenizer.token_ids,
    )  # fmt: skip


def vllm_python() -> Path:
    """The interpreter of the vLLM environment that `tools/check.py --with-vllm` makes."""
    given = os.environ.get("SOLOLLM_VLLM_PYTHON")
    if not given:
        pytest.fail("SOLOLLM_VLLM_PYTHON names no interpreter; run tools/check.py --with-vllm")
    # Else it binds its threads to the first cores, every vLLM of the tests to the same ones.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return Path(given)


@pytest.fixture(scope="session")
def serving(served_checkpoint: Path) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers over the tiny model by backend name and changed options; each once."""
    running: dict[str, RunningServer] = {}

    def start(backend: str, *, limits: Limits | None = None, **changes: Any) -> RunningServer:
        key = f"{backend} {limits} {changes}"
        if key not in running:
            if backend == "vllm":
                changes = {**VLLM, "vllm_python": vllm_python(), **changes}
            elif importlib.util.find_spec({"mlx": "mlx_lm"}.get(backend, backend)) is None:
                pytest.skip(f"{backend} is not installed")
            else:
                changes = {"backend": backend, **changes}
            options = ServeOptions(
                access=AccessRules(), port=0, limits=limits or Limits(),
                engines=EngineSettings(**changes),
            )  # fmt: skip
            running[key] = RunningServer([ModelSource(served_checkpoint, NAME)], options)
        return running[key]

    yield start
    for server in running.values():
        server.close()
