"""A server whose models say what they are told to, at the pace they are told to: for tests of what
stands around the models, the chat page and the guard."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from solollm.serving.access import AccessRules
from solollm.serving.app import Front, build_app
from solollm.serving.catalogue import Catalogue, ServedModel
from solollm.serving.limits import Limits
from solollm.serving.metrics import Interventions, Metrics
from solollm.serving.text_filter import FilterFactory
from solollm.serving.token_engine import (
    EngineInfo,
    EngineState,
    EngineUnavailable,
    Token,
    TokenEngine,
    TokenJob,
    TokenStream,
)
from solollm.tokenizer import Tokenizer

Reply = Callable[[str, TokenJob], str]


class ScriptedTokenEngine(TokenEngine):
    """`reply(prompt, job)` is what it says, one token every `pause` seconds.

    Attributes:
        prompts: what it was asked, special tokens written out.
    """

    def __init__(self, tokenizer: Tokenizer, reply: Reply, pause: float = 0.0) -> None:
        self.tokenizer, self.reply, self.pause = tokenizer, reply, pause
        self.jobs: list[TokenJob] = []
        self.prompts: list[str] = []
        self.num_cancelled = 0
        self.state_now: EngineState = "ready"

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("scripted", "nowhere", 4096, 64)

    @property
    def state(self) -> EngineState:
        return self.state_now

    @property
    def num_active(self) -> int:
        return 0

    @property
    def num_restarts(self) -> int:
        return 0

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def open(self, jobs: Sequence[TokenJob]) -> TokenStream:
        self.jobs += jobs
        return _ScriptedStream(self, jobs)


class _ScriptedStream(TokenStream):
    def __init__(self, engine: ScriptedTokenEngine, jobs: Sequence[TokenJob]) -> None:
        self._engine = engine
        self._rest: dict[int, list[int]] = {}
        for index, job in enumerate(jobs):
            prompt = engine.tokenizer.decode(job.prompt_ids, skip_special=False)
            engine.prompts.append(prompt)
            answer = engine.tokenizer.encode(engine.reply(prompt, job))
            self._rest[index] = answer[: job.max_new_tokens]

    async def next(self) -> Sequence[tuple[int, Token]]:
        await asyncio.sleep(self._engine.pause)
        if self._engine.state_now != "ready":
            raise EngineUnavailable("the model's worker ended; it is being started again")
        tokens = []
        for index, rest in list(self._rest.items()):
            if rest:
                tokens.append((index, Token(rest.pop(0), 0.0, None)))
            else:
                del self._rest[index]
                tokens.append((index, Token(-1, 0.0, "stop")))
        return tokens

    def cancel(self, index: int) -> None:
        self._rest.pop(index, None)
        self._engine.num_cancelled += 1

    async def close(self) -> None:
        self._engine.num_cancelled += len(self._rest)
        self._rest.clear()


class ScriptedServer:
    """Models by name behind the real front, on a thread of this process, until `close`."""

    def __init__(
        self, engines: dict[str, ScriptedTokenEngine], *, chat: Sequence[str] | None = None,
        key: str = "", filters: FilterFactory | None = None,
        interventions: Interventions | None = None,
    ) -> None:  # fmt: skip
        chat = list(engines) if chat is None else chat
        models = [
            ServedModel(
                name=name, root=name, engine=engine, tokenizer=engine.tokenizer,
                checkpoint=Path(name), stop_ids=frozenset(), is_chat=name in chat,
            )
            for name, engine in engines.items()
        ]  # fmt: skip
        metrics = Metrics() if interventions is None else Metrics(interventions)
        front = Front(Catalogue(models), Limits(), metrics, filters)
        config = uvicorn.Config(
            build_app(front, AccessRules(key=key)), host="127.0.0.1", port=0, ws="none",
            lifespan="off", loop="asyncio", log_config=None, access_log=False,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._up.wait(60), "the server did not come up"

    async def _run(self) -> None:
        serving = asyncio.create_task(self._server.serve())
        while not (self._server.started or serving.done()):
            await asyncio.sleep(0.01)
        if self._server.started:
            port = self._server.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
        self._up.set()
        await serving

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not end"
