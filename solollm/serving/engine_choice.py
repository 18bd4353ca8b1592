"""Which engine serves a model, and why; each choice is one sentence for the user.

`auto` takes vLLM where it is at home, on a CUDA card whose owner has installed it, and the built-in
engine everywhere else: that needs no installation and starts in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx

from solollm.completion import TextSide
from solollm.engine_input import read_model_config
from solollm.errors import ConfigError, nearest, quoted
from solollm.hardware import nvidia_gpus
from solollm.serving.built_in import BuiltInEngine
from solollm.serving.limits import Limits
from solollm.serving.token_engine import TokenEngine
from solollm.serving.vllm_engine import VllmEngine
from solollm.serving.vllm_environment import FoundVllm, find_vllm, find_vllm_metal
from solollm.serving.vllm_process import MODEL_NAME, VllmProcess, VllmSettings

ENGINES = ("auto", "builtin", "vllm")


@dataclass(frozen=True)
class EngineSettings:
    """What decides on the engine and shapes it.

    Attributes:
        engine: auto, builtin, vllm, or the address of a running vLLM.
        backend: of the built-in engine: auto, torch, mlx.
        max_seq_len: tokens of prompt and answer together; 0: the model's.
        adapters: names to folders in PEFT's layout or mlx-lm's, or to runs of adapters.
        vllm_python: an interpreter that has vLLM, instead of the one installed.
        vllm_eager: no compiling in vLLM: slower, but up in a fraction of the time.
    """

    engine: str = "auto"
    backend: str = "auto"
    max_batch_size: int = 16
    max_seq_len: int = 0
    adapters: Mapping[str, Path] = field(default_factory=dict)
    vllm_python: Path | None = None
    vllm_eager: bool = False


@dataclass(frozen=True)
class EngineChoice:
    """`kind`, the reason in words, and what was found for it."""

    kind: Literal["builtin", "vllm", "attached"]
    reason: str
    vllm: FoundVllm | None = None
    url: str = ""


def choose_engine(settings: EngineSettings) -> EngineChoice:
    """The engine to use here.

    Raises:
        ConfigError: an unknown name, or vLLM asked for where there is none.
    """
    wanted = settings.engine
    if urlsplit(wanted).scheme in ("http", "https"):
        return EngineChoice("attached", f"vLLM at {wanted}: asked for", url=wanted)
    if wanted not in ENGINES:
        raise ConfigError(
            f"unknown engine {wanted!r}", why=nearest(wanted, ENGINES),
            fix=f"{', '.join(ENGINES)}, or the http:// address of a running vLLM",
        )  # fmt: skip
    if wanted == "builtin":
        return EngineChoice("builtin", "built-in engine: asked for")
    if wanted == "vllm" or settings.vllm_python is not None:
        found = find_vllm(settings.vllm_python)
        if found is None:
            raise ConfigError(
                "vLLM is not installed",
                fix="`solollm engines install vllm` makes it an environment of its own;"
                " --vllm-python PATH takes one that exists",
            )
        return EngineChoice("vllm", f"vLLM ({found.origin}): asked for", vllm=found)
    return _automatic()


def make_engine(
    choice: EngineChoice, side: TextSide, settings: EngineSettings, limits: Limits, *, base: Path
) -> TokenEngine:
    """The chosen engine over a checkpoint, not started yet. `base`: the checkpoint's folder, or its
    base's where it holds an adapter.

    Raises:
        ConfigError: settings that the model or the engine cannot have.
    """
    model = read_model_config(base)
    padding = range(side.tokenizer.vocab_size, model.vocab_size)
    if choice.kind == "builtin":
        options = {
            "max_batch_size": settings.max_batch_size, "max_seq_len": settings.max_seq_len,
            "adapters": {name: str(folder) for name, folder in settings.adapters.items()},
        }  # fmt: skip
        worker = {"backend": settings.backend, "options": options}
        return BuiltInEngine(side.checkpoint, worker, limits)
    if base != side.checkpoint:
        raise ConfigError(
            f"vLLM serves no adapter's run as a model of its own: {side.checkpoint}",
            fix=f"solollm serve {quoted(base)} --adapter NAME={quoted(side.checkpoint)},"
            " or merge it: solollm export --to hf --merge",
        )
    if choice.kind == "attached":
        client = httpx.AsyncClient(
            base_url=choice.url.rstrip("/").removesuffix("/v1"),
            timeout=httpx.Timeout(None, connect=5.0), limits=httpx.Limits(max_connections=None),
        )  # fmt: skip
        return VllmEngine(
            client, limits, max_batch_size=settings.max_batch_size, padding_ids=padding
        )
    assert choice.vllm is not None
    process = VllmProcess(
        side.checkpoint,
        VllmSettings(
            python=choice.vllm.python,
            max_seq_len=settings.max_seq_len or model.max_position_embeddings,
            max_batch_size=settings.max_batch_size,
            dtype="auto" if nvidia_gpus() else "float32",
            adapters=settings.adapters,
            eager=settings.vllm_eager,
            memory_bytes=0 if nvidia_gpus() else 1 << 30,
        ),
    )
    return VllmEngine(
        process.client(), limits, model=MODEL_NAME, max_batch_size=settings.max_batch_size,
        padding_ids=padding, child=process,
    )  # fmt: skip


def _automatic() -> EngineChoice:
    cards, metal = nvidia_gpus(), find_vllm_metal()
    if metal is not None:
        return EngineChoice("builtin", "built-in engine: vllm-metal is here too, by --engine vllm")
    if not cards:
        return EngineChoice("builtin", "built-in engine: there is no CUDA card, which vLLM is for")
    found = find_vllm()
    if found is None:
        return EngineChoice(
            "builtin", f"built-in engine: vLLM would use the {cards[0].name} better;"
            " `solollm engines install vllm`",
        )  # fmt: skip
    return EngineChoice("vllm", f"vLLM ({found.origin}): made for the {cards[0].name}", vllm=found)
