"""Serving models: from folders to a listening server, and its end.

`serve` blocks; `start_serving` is the same on a running event loop. The socket listens from the
beginning, so that `/health` can say that models are still loading; a model that cannot be loaded
ends the server with its error.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvicorn

from solollm.bases import find_base, is_adapter
from solollm.completion import TextSide, read_text_side
from solollm.errors import BackendError, ConfigError
from solollm.serving.access import AccessRules
from solollm.serving.app import Front, build_app
from solollm.serving.catalogue import Catalogue, ServedModel
from solollm.serving.connections import protocol_class
from solollm.serving.engine_choice import (
    EngineChoice,
    EngineSettings,
    choose_engine,
    make_engine,
)
from solollm.serving.limits import Limits
from solollm.serving.metrics import Interventions, Metrics
from solollm.serving.offered_adapters import OfferedAdapter, open_offered
from solollm.serving.text_filter import FilterFactory
from solollm.serving.token_engine import TokenEngine
from solollm.serving.tool_calls import tool_style

_BACKLOG = 2048
_TEXT_THREADS = 4  # they lay out and tokenize prompts; a template may take seconds


@dataclass(frozen=True)
class ServeOptions:
    """How models are served.

    Attributes:
        port: 0: any free one.
        engines: which engine, and how it is set up.
        filters: see `text_filter`; `interventions`: what they did, for `/metrics`.
    """

    access: AccessRules = field(default_factory=AccessRules)
    port: int = 8000
    engines: EngineSettings = field(default_factory=EngineSettings)
    limits: Limits = field(default_factory=Limits)
    filters: FilterFactory | None = None
    interventions: Interventions = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSource:
    """A run or checkpoint folder and the name it is served under (empty: the folder's)."""

    path: Path
    name: str = ""


@dataclass(frozen=True)
class Listening:
    """Where a server is reached, what it offers, and notes for whoever started it. `is_chat`:
    whether the first model was tuned to answer."""

    url: str
    models: tuple[str, ...]
    notes: tuple[str, ...]
    is_chat: bool


def serve(
    sources: Sequence[ModelSource],
    options: ServeOptions,
    *,
    on_ready: Callable[[Listening], None],
) -> None:
    """Serve until SIGINT or SIGTERM, which let answers under way end.

    Raises:
        ConfigError, IntegrityError, BackendError: a model that cannot be served, or a taken port.
    """
    asyncio.run(start_serving(sources, options, on_ready=on_ready))


async def start_serving(
    sources: Sequence[ModelSource],
    options: ServeOptions,
    *,
    on_ready: Callable[[Listening], None],
    until: asyncio.Event | None = None,
) -> None:
    """`serve` on a running loop; setting `until` ends it as SIGTERM does."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_TEXT_THREADS))
    catalogue, notes = open_catalogue(sources, options)
    front = Front(catalogue, options.limits, Metrics(options.interventions), options.filters)
    sock = _listen(options.access.host, options.port)
    server = _server(front, options)
    engines = catalogue.engines
    loading = asyncio.create_task(_start(catalogue))
    loading.add_done_callback(lambda done: _loaded(done, server, on_ready, sock, catalogue, notes))
    ending = asyncio.create_task(_end_when(until, server))
    try:
        await server.serve(sockets=[sock])
        if loading.done():
            loading.result()
    finally:
        ending.cancel()
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await loading
        await asyncio.gather(*(engine.stop() for engine in engines.values()))
        sock.close()


def open_catalogue(
    sources: Sequence[ModelSource], options: ServeOptions
) -> tuple[Catalogue, tuple[str, ...]]:
    """The models of some folders, each behind an engine that is not started yet; and notes."""
    choice = choose_engine(options.engines)
    models: list[ServedModel] = []
    notes: list[str] = [choice.reason]
    for source in sources:
        side = read_text_side(source.path)
        base = find_base(side.checkpoint) if is_adapter(side.checkpoint) else side.checkpoint
        offered = open_offered(options.engines.adapters, base, vocab_size=side.tokenizer.vocab_size)
        folders = {name: adapter.folder for name, adapter in offered.items()}
        settings = replace(options.engines, adapters=folders)
        engine = make_engine(choice, side, settings, options.limits, base=base)
        model = _served(source.name or _name_of(source.path), side, engine)
        models.append(model)
        for name, adapter in offered.items():
            own = _served(name, adapter.side or side, engine)
            models.append(replace(own, root=model.name, adapter=name))
            notes += adapter.notes
        notes += [*side.notes, *_codec_notes(offered, choice, model.name)]
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two models would be called {twice!r}", fix="name them: NAME=RUN_OR_CHECKPOINT"
        )
    return Catalogue(models), tuple(notes)


def _codec_notes(
    offered: Mapping[str, OfferedAdapter], choice: EngineChoice, model: str
) -> list[str]:
    """What it means that adapters were trained over a quantised base."""
    codecs = {name: adapter.codec for name, adapter in offered.items() if adapter.codec}
    if not codecs:
        return []
    names, held = ", ".join(codecs), ", ".join(sorted(set(codecs.values())))
    if choice.kind == "builtin":
        return [f"{model}: held in {held}, as it was while {names} learnt"]
    return [f"{names}: learnt over a base in {held}, which vLLM holds unquantised"]


def _served(name: str, side: TextSide, engine: TokenEngine) -> ServedModel:
    try:
        template = side.tokenizer.chat_template.source
    except ConfigError:  # a base model's tokenizer may have none
        template = ""
    return ServedModel(
        name=name, root=name, engine=engine, tokenizer=side.tokenizer, checkpoint=side.checkpoint,
        stop_ids=side.stop_ids, is_chat=side.is_chat, tools=tool_style(template),
    )  # fmt: skip


def _name_of(path: Path) -> str:
    """A run's name; of a checkpoint within a run, `run-step`."""
    folder = path.resolve()
    if folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}-{folder.name}"
    return folder.name


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=_BACKLOG)
    except OSError as error:
        why = str(error.strerror or error).partition(" (while")[0]  # which says the address again
        raise ConfigError(
            f"cannot listen on {host}:{port}", why=why,
            fix="give another --port (0: any free one), or stop what uses it",
        ) from error  # fmt: skip


def _server(front: Front, options: ServeOptions) -> uvicorn.Server:
    limits = options.limits
    config = uvicorn.Config(
        build_app(front, options.access), http=protocol_class(limits), ws="none", lifespan="off",
        loop="asyncio", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, h11_max_incomplete_event_size=limits.max_header_bytes,
        timeout_graceful_shutdown=max(1, round(limits.drain_seconds)),
    )  # fmt: skip
    return uvicorn.Server(config)


async def _start(catalogue: Catalogue) -> None:
    await asyncio.gather(*(engine.start() for engine in catalogue.engines.values()))
    for model in catalogue:
        if model.adapter is not None and model.adapter not in model.engine.info.adapters:
            raise BackendError(
                f"the engine serves no adapter {model.adapter!r}",
                why=f"it serves: {', '.join(model.engine.info.adapters) or 'none'}",
                fix="start that vLLM with --lora-modules NAME=FOLDER, under this name",
            )


def _loaded(  # sizes: a callback, whose one caller is beside it
    done: asyncio.Task[None], server: uvicorn.Server, on_ready: Callable[[Listening], None],
    sock: socket.socket, catalogue: Catalogue, notes: Sequence[str],
) -> None:  # fmt: skip
    if done.cancelled():
        return
    if done.exception() is not None:
        server.should_exit = True
        return
    host, port = sock.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    devices = [
        f"{model.name}: {model.checkpoint}, {model.engine.info.name}, {model.engine.info.device}"
        for model in catalogue
        if model.adapter is None
    ]
    names = tuple(model.name for model in catalogue)
    is_chat = next(iter(catalogue)).is_chat
    on_ready(Listening(f"http://{address}:{port}", names, (*notes, *devices), is_chat))


async def _end_when(until: asyncio.Event | None, server: uvicorn.Server) -> None:
    if until is not None:
        await until.wait()
        server.should_exit = True
