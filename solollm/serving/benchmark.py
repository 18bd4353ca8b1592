"""`solollm bench serve`: the same load on this server, on vLLM and on mlx_lm.server, in turns.

Each stack is a process tree of its own over the same checkpoint, with the same number of sequences
at once, and without our guard, which the others do not have. At every number of users each stack
gets the same prompts, of which none was seen before; its processor time stands beside the wall
time, because on a busy machine only the former says anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from solollm.completion import TextSide, read_text_side
from solollm.engine_input import read_model_config
from solollm.errors import BackendError, ConfigError, nearest
from solollm.hardware import nvidia_gpus
from solollm.serving.load import Load, LoadResult, Target, run_load
from solollm.serving.vllm_environment import find_vllm
from solollm.serving.vllm_process import MODEL_NAME, VllmProcess, VllmSettings

STACKS = ("solollm-torch", "solollm-mlx", "vllm", "mlx_lm.server")
DEFAULT_USERS = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_BATCH = 16
_START_SECONDS = 900.0
_NAME = "model"


@dataclass(frozen=True)
class ServeBenchmark:
    """Results by stack, in the order of `users`; `missing`: why a stack that is here did not start,
    or from how many users on it did not answer, by stack."""

    stacks: dict[str, tuple[LoadResult, ...]]
    missing: dict[str, str]
    users: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    max_batch_size: int

    def agreement(self, stack: str) -> float:
        """The share of a stack's requests with the same text as the first stack gave."""
        first, own = (self._texts(name) for name in (next(iter(self.stacks)), stack))
        pairs = list(zip(first, own, strict=False))  # a stack that broke off has fewer
        return sum(a == b for a, b in pairs) / len(pairs)

    def _texts(self, stack: str) -> list[str]:
        return [seen.text for result in self.stacks[stack] for seen in result.seen]

    def scaling(self, stack: str, users: int) -> float:
        """Tokens per processor second at this many users, over those at one; 0 without either."""
        found = {result.load.users: result for result in self.stacks[stack]}
        if users not in found or 1 not in found or not found[1].tokens_per_cpu_second:
            return 0.0
        return found[users].tokens_per_cpu_second / found[1].tokens_per_cpu_second

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens,
            "max_batch_size": self.max_batch_size,
            "agreement": {name: self.agreement(name) for name in self.stacks},
            "missing": self.missing,
            "stacks": {name: [r.to_json() for r in of] for name, of in self.stacks.items()},
        }  # fmt: skip


def bench_serve(
    path: Path,
    *,
    stacks: Sequence[str] = (),
    users: Sequence[int] = DEFAULT_USERS,
    load: Load | None = None,
    prompt_tokens: int = 32,
    max_batch_size: int = DEFAULT_BATCH,
    vllm_python: Path | None = None,
    tell: Callable[[str], None],
) -> ServeBenchmark:
    """Measure the stacks (default: all that are here) at each number of users.

    Raises:
        ConfigError: an unknown stack, or one that is not here; prompts that do not fit.
        BackendError: a named stack, or the only one, that does not start; none that answered.
    """
    side = read_text_side(path)
    load = load or Load(1)
    model = read_model_config(side.checkpoint)
    if prompt_tokens + load.new_tokens > model.max_position_embeddings:
        raise ConfigError(
            f"{prompt_tokens} and {load.new_tokens} tokens do not fit the model's"
            f" {model.max_position_embeddings}", fix="give smaller ones",
        )  # fmt: skip
    chosen = _chosen(stacks, vllm_python)
    per_user = 1 + load.requests_per_user  # the first to warm up
    prompts = iter(_prompts(side, prompt_tokens, per_user * sum(users)))
    results: dict[str, list[LoadResult]] = {}
    with contextlib.ExitStack() as running:
        servers, missing = {}, dict[str, str]()
        for name in chosen:
            tell(f"starting {name}")
            opened = _running(name, side, max_batch_size, vllm_python)
            try:
                servers[name] = running.enter_context(opened)
            except BackendError as error:
                if stacks or len(chosen) == 1:
                    raise
                missing[name] = str(error)
        for count in users:
            sized = replace(load, users=count)
            first = list(itertools.islice(prompts, count))
            own = list(itertools.islice(prompts, count * load.requests_per_user))
            for name, (target, cpu) in list(servers.items()):
                tell(f"{name}: {count} users")
                try:
                    run_load(target, replace(sized, requests_per_user=1), first, cpu_seconds=cpu)
                    result = run_load(target, sized, own, cpu_seconds=cpu)
                except BackendError as error:
                    missing[name] = f"at {count} users: {error}"
                    del servers[name]
                    continue
                results.setdefault(name, []).append(result)
    if not results:
        raise BackendError("no stack answered", why="; ".join(map(": ".join, missing.items())))
    done = {name: tuple(of) for name, of in results.items()}
    return ServeBenchmark(
        done, missing, tuple(users), prompt_tokens, load.new_tokens, max_batch_size
    )


def _chosen(stacks: Sequence[str], vllm_python: Path | None) -> list[str]:
    here = {
        "solollm-torch": importlib.util.find_spec("torch") is not None,
        "solollm-mlx": importlib.util.find_spec("mlx_lm") is not None,
        "vllm": find_vllm(vllm_python) is not None,
        "mlx_lm.server": importlib.util.find_spec("mlx_lm") is not None,
    }
    for name in stacks:
        if not here.get(name):
            raise ConfigError(
                f"there is no stack {name!r} here", why=nearest(name, STACKS),
                fix=f"here are: {', '.join(n for n in STACKS if here[n])}",
            )  # fmt: skip
    return list(stacks) or [name for name in STACKS if here[name]]


def _prompts(side: TextSide, length: int, count: int) -> list[str]:
    """Texts of about `length` tokens, no two alike at the beginning: no cache helps anyone."""
    rng = np.random.default_rng(0)
    special = side.tokenizer.special_tokens.values()
    plain = [i for i in range(side.tokenizer.vocab_size) if i not in special]
    words = [i for i in plain if side.tokenizer.token_bytes(i).strip(b" ").isalnum()] or plain
    return [side.tokenizer.decode(rng.choice(words, length - 1).tolist()) for _ in range(count)]


def _beginning(side: TextSide) -> str:
    """What the other stacks need before a text so that it begins with the same token as on ours."""
    from tokenizers import Tokenizer as PlainTokenizer

    plain = PlainTokenizer.from_file(str(side.checkpoint / "tokenizer.json"))
    first, bos = plain.encode("a").ids[0], side.tokenizer.bos_id
    return "" if first == bos else side.tokenizer.decode([bos], skip_special=False)


@contextlib.contextmanager
def _running(
    name: str, side: TextSide, max_batch_size: int, vllm_python: Path | None
) -> Iterator[tuple[Target, Callable[[], float]]]:
    """A stack's server and a function that gives the processor time of its processes."""
    if name == "vllm":
        with _vllm(side, max_batch_size, vllm_python) as found:
            yield found
        return
    if name == "mlx_lm.server":
        port = _free_port()
        command = [
            sys.executable, "-m", "mlx_lm", "server", "--model", str(side.checkpoint),
            "--host", "127.0.0.1", "--port", str(port), "--log-level", "ERROR",
            "--decode-concurrency", str(max_batch_size),
        ]  # fmt: skip
        with _process(command) as child:
            url = f"http://127.0.0.1:{port}"
            _until_answers(child, url)
            # It reads any path that a request names; this one it has already.
            yield Target(url, "default_model", prefix=_beginning(side)), _cpu_of(child.pid)
        return
    command = [
        sys.executable, "-m", "solollm", "serve", f"{_NAME}={side.checkpoint}", "--port", "0",
        "--engine", "builtin", "--backend", name.removeprefix("solollm-"), "--json",
        "--guard", "off", "--max-batch-size", str(max_batch_size),
    ]  # fmt: skip
    with _process(command) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise BackendError(f"{name} did not start", fix="see what `solollm serve` says")
        yield Target(json.loads(line)["url"], _NAME), _cpu_of(child.pid)


@contextlib.contextmanager
def _vllm(
    side: TextSide, max_batch_size: int, python: Path | None
) -> Iterator[tuple[Target, Callable[[], float]]]:
    found = find_vllm(python)
    assert found is not None, "asked for where there is none"
    model = read_model_config(side.checkpoint)
    has_card = bool(nvidia_gpus())
    settings = VllmSettings(
        python=found.python, max_seq_len=model.max_position_embeddings, eager=not has_card,
        dtype="auto" if has_card else "float32", memory_bytes=0 if has_card else 1 << 30,
        max_batch_size=max_batch_size,
    )  # fmt: skip
    process = VllmProcess(side.checkpoint, settings)
    try:
        asyncio.run(process.revive())
        assert process.pid is not None
        target = Target("http://vllm", MODEL_NAME, str(process.socket), _beginning(side))
        yield target, _cpu_of(process.pid)
    finally:
        asyncio.run(process.close())


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _until_answers(child: subprocess.Popen[str], url: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise BackendError(f"the server at {url} did not start")


def _cpu_of(pid: int) -> Callable[[], float]:
    """User and system seconds of a process and all below it."""

    def measured() -> float:
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(pid)
            for process in (top, *top.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    return measured


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
