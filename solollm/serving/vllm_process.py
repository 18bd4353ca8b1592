"""A vLLM server as a child of ours: its command line, its environment, its life and death.

It listens on a Unix socket in a folder that only this user can enter, never on an address. It reads
a folder of links to the checkpoint's model files, because it would load the optimizer's too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from solollm.errors import BackendError, ConfigError, quoted

_START_SECONDS = 900.0  # compiling kernels for a card takes minutes
_POLL_SECONDS = 0.25
_MAX_PAUSE = 30.0
_MAX_LORAS = 8  # in one batch of a card; each takes memory of its own
_LOG_TAIL = 12  # lines
# Ends vLLM and removes its folder when the server that started it is gone, however it went: vLLM's
# own processes go on without it, and would keep a card's memory.
_KEEPER = """
import os, shutil, signal, sys
sys.stdin.read()
try:
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except ProcessLookupError:
    pass
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""
MODEL_NAME = "base"
MAX_LOGPROBS = 20 + 63  # what clients may ask for, and the padding rows that may stand before them
_MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "model.safetensors", "model.safetensors.index.json",
    "model-*.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class VllmSettings:
    """Attributes:
    python: the interpreter of the environment that holds vLLM.
    adapters: names to folders in PEFT's layout.
    eager: no compiling: slower, but up in a fraction of the time.
    memory_bytes: for keys and values on a processor; 0: vLLM's default.
    """

    python: Path
    max_seq_len: int
    max_batch_size: int = 16
    dtype: str = "auto"
    adapters: Mapping[str, Path] = field(default_factory=dict)
    eager: bool = False
    memory_bytes: int = 0


def command_line(settings: VllmSettings, folder: Path, sock: Path) -> list[str]:
    """What starts vLLM. The module form, because some builds ship a broken `vllm` command."""
    words = [
        str(settings.python), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(folder), "--served-model-name", MODEL_NAME, "--uds", str(sock),
        "--max-model-len", str(settings.max_seq_len),
        "--max-num-seqs", str(settings.max_batch_size),
        "--max-logprobs", str(MAX_LOGPROBS), "--dtype", settings.dtype,
        "--generation-config", "vllm",
        "--structured-outputs-config", '{"backend":"guidance","disable_any_whitespace":true}',
        "--disable-fastapi-docs", "--no-enable-log-requests", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if settings.eager:
        words.append("--enforce-eager")
    if MODEL_NAME in settings.adapters:
        raise ConfigError(
            f"vLLM has no adapter called {MODEL_NAME!r}", why="the model itself goes by that name",
            fix="give the adapter another name",
        )  # fmt: skip
    if settings.adapters:
        rank = max(_rank(adapter) for adapter in settings.adapters.values())
        words += ["--enable-lora", "--max-lora-rank", str(_allowed_rank(rank))]
        words += ["--max-loras", str(_lora_slots(settings)), "--lora-modules"]
        words += [f"{name}={path.resolve()}" for name, path in settings.adapters.items()]
    return words


def environment(settings: VllmSettings) -> dict[str, str]:
    """Ours, less what would lead it astray; nothing is fetched and nothing is reported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SOLOLLM_"))}
    kept |= {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1", "VLLM_ENGINE_READY_TIMEOUT_S": f"{_START_SECONDS:.0f}",
    }  # fmt: skip
    if settings.memory_bytes:
        kept["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, settings.memory_bytes >> 30))
    return kept


class VllmProcess:
    """The child. `revive` is what `VllmEngine` calls to have it running."""

    def __init__(self, checkpoint: Path, settings: VllmSettings) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        # Not under a deep temporary folder: a socket's path has about 100 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="solollm-vllm-", dir=_short_folder()))
        self._child: subprocess.Popen[bytes] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._pause = 0.0
        self.socket = self._folder / "s"
        self.log = self._folder / "log"
        _link_model(checkpoint, self._folder / "model")

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    def client(self) -> httpx.AsyncClient:
        """Speaks to it; a token may be long in coming."""
        transport = httpx.AsyncHTTPTransport(
            uds=str(self.socket), limits=httpx.Limits(max_connections=None)
        )
        return httpx.AsyncClient(
            transport=transport, base_url="http://vllm", timeout=httpx.Timeout(None, connect=5.0)
        )

    async def revive(self) -> None:
        """End what is left of it, start it, and wait until it answers.

        Raises:
            BackendError: it died, or took too long; with the end of its log.
        """
        await self.end()
        await asyncio.sleep(self._pause)
        self._pause = min(_MAX_PAUSE, 2 * self._pause or 1.0)
        self.socket.unlink(missing_ok=True)
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                command_line(self._settings, self._folder / "model", self.socket),
                env=environment(self._settings), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, cwd=self._folder,
            )  # fmt: skip
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _KEEPER, str(self._child.pid), str(self._folder)],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        await self._until_well()
        self._pause = 0.0

    async def end(self) -> None:
        """SIGTERM, then SIGKILL, to it and its own children."""
        child = self._child
        if child is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(child.wait, 15)
        self._child = None  # last: who is cancelled in between comes back to end it
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.communicate()
            self._keeper = None

    async def close(self) -> None:
        """End it and remove its folder."""
        await self.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _until_well(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_SECONDS
        async with self.client() as client:
            while loop.time() < deadline:
                assert self._child is not None
                if self._child.poll() is not None:
                    raise self._failed(f"it ended with code {self._child.returncode}")
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/health", timeout=5.0)).status_code == 200:
                        return
                await asyncio.sleep(_POLL_SECONDS)
        raise self._failed(f"it did not answer within {_START_SECONDS:g} seconds")

    def _failed(self, why: str) -> BackendError:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
        return BackendError(
            "vLLM did not start", why="\n".join([why, *lines]),
            fix="--engine builtin serves the same model without it",
        )  # fmt: skip


def _link_model(checkpoint: Path, folder: Path) -> None:
    folder.mkdir()
    for pattern in _MODEL_FILES:
        for path in checkpoint.glob(pattern):
            (folder / path.name).symlink_to(path.resolve())


def _lora_slots(settings: VllmSettings) -> int:
    """How many adapters vLLM holds at once.

    On a processor one more than there are: its kernels take a row without an adapter, marked -1,
    for one of the last slot, which must therefore stay empty. That can go with the fix of
    https://github.com/vllm-project/vllm/pull/48421 (0.32 has the fault; cards do not).
    """
    count = len(settings.adapters)
    return count + 1 if settings.memory_bytes else min(count, _MAX_LORAS)


def _rank(adapter: Path) -> int:
    import json

    path = adapter / "adapter_config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{adapter} is no adapter in PEFT's layout, which vLLM reads",
            why=f"{path.name}: {error!r}",
            fix=f"solollm import {quoted(adapter)} --base MODEL --out FOLDER makes one of mlx-lm's",
        ) from error


def _allowed_rank(rank: int) -> int:
    """The smallest of the ranks that vLLM has kernels for."""
    allowed: Sequence[int] = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    fitting = [size for size in allowed if size >= rank]
    if not fitting:
        raise ConfigError(f"vLLM serves adapters up to rank {allowed[-1]}, not {rank}")
    return fitting[0]


def _short_folder() -> str | None:
    """A base for the socket's folder; None: the system's own, where that is short enough."""
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"
