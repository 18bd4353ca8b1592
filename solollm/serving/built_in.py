"""The engine that needs no extra install: a backend's Decoder in a worker process, kept alive.

The worker (`worker`) may be killed or crash at any moment: what was under way fails with
`EngineUnavailable`, a new one is started at once, and again with growing pauses (5 seconds at most)
while it dies before it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from solollm import errors
from solollm.serving import wire
from solollm.serving.limits import Limits
from solollm.serving.token_engine import (
    EngineBusy,
    EngineFailure,
    EngineInfo,
    EngineState,
    EngineUnavailable,
    JobRefused,
    QueuedStream,
    TokenEngine,
    TokenJob,
    TokenStream,
)

_PROGRAM = (
    "import sys, json; from solollm.serving.worker import main; main(*json.loads(sys.argv[1]))"
)
_MAX_PAUSE = 5.0  # seconds between two starts of a worker that does not come up
_WATCH_SECONDS = 1.0


class BuiltInEngine(TokenEngine):
    """A model of a checkpoint folder in a supervised worker.

    Args:
        settings: `backend` and `options`, the fields of `EngineOptions`, as `worker.main` takes.
    """

    def __init__(self, checkpoint: Path, settings: Mapping[str, Any], limits: Limits) -> None:
        self._checkpoint = checkpoint
        self._settings = dict(settings)
        self._limits = limits
        self._numbers = itertools.count(1)
        self._streams: dict[int, tuple[_Stream, int]] = {}  # job number -> (stream, index in it)
        self._state: EngineState = "stopped"
        self._info: EngineInfo | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._restarts = 0
        self._last_heard = 0.0

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "asked before start()"
        return self._info

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def num_active(self) -> int:
        return len(self._streams)

    @property
    def num_restarts(self) -> int:
        return self._restarts

    @property
    def pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise(first))
        try:
            await first
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        self._state = "stopped"
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def open(self, jobs: Sequence[TokenJob]) -> TokenStream:
        if self._state != "ready" or self._writer is None:
            raise EngineUnavailable(f"the model's worker is {self._state}")
        room = self.info.max_batch_size + self._limits.max_waiting
        if len(self._streams) + len(jobs) > room:
            raise EngineBusy(f"{len(self._streams)} sequences are under way or waiting")
        stream = _Stream(self, jobs)
        for index, job in enumerate(jobs):
            number = next(self._numbers)
            stream.numbers.append(number)
            self._streams[number] = (stream, index)
            self._writer.write(wire.packed(wire.job_message(number, job)))
        if len(self._streams) == len(jobs):
            self._last_heard = time.monotonic()  # it was idle till now
        return stream

    def forget(self, number: int) -> None:
        """Take a job out that still runs."""
        if self._streams.pop(number, None) is not None and self._writer is not None:
            self._writer.write(wire.packed({"op": "cancel", "job": number}))

    async def _supervise(self, first: asyncio.Future[None]) -> None:
        """Keep a worker alive until cancelled."""
        pause = 0.0
        while True:
            self._state = "starting"
            try:
                await asyncio.sleep(pause)
                reader = await self._spawn()
                await self._until_ready(reader)
                pause = 0.0
                if not first.done():
                    first.set_result(None)
                await self._listen(reader)
            except errors.SoloLLMError as error:
                if not first.done():
                    first.set_exception(error)
                    return
            finally:
                await self._end_worker()
            self._restarts += 1
            pause = min(_MAX_PAUSE, 2 * pause or 0.1)

    async def _spawn(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        try:
            arguments = [theirs.fileno(), str(self._checkpoint), self._settings]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, json.dumps(arguments)],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        return reader

    async def _until_ready(self, reader: asyncio.StreamReader) -> None:
        """Raises the error that the worker tells of, or BackendError where it just dies."""
        message = await wire.receive(reader)
        if message is None:
            raise errors.BackendError("the worker died while it loaded the model")
        if message["op"] == "fatal":
            told = message["error"]
            kind: type[errors.SoloLLMError] = getattr(errors, told["kind"], errors.BackendError)
            raise kind(told["what"], why=told["why"], fix=told["fix"])
        info = message["info"]
        self._info = EngineInfo(**{**info, "adapters": tuple(info["adapters"])})
        self._state = "ready"

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Hand out what the worker says until it is gone, or silent for too long."""
        watch = asyncio.create_task(self._watch())
        try:
            while (message := await wire.receive(reader)) is not None:
                self._last_heard = time.monotonic()
                if message["op"] == "tokens":
                    self._hand_out(message["items"])
                else:
                    self._fail(message)
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        """Kill a worker that has work and says nothing."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            silent = time.monotonic() - self._last_heard
            if self._streams and silent > self._limits.stall_seconds and self._process:
                self._process.kill()

    def _hand_out(self, items: list[list[Any]]) -> None:
        for row in items:
            number, token = wire.token_of(row)
            place = self._streams.get(number)
            if place is None:
                continue  # cancelled meanwhile
            if token.finish_reason is not None:
                del self._streams[number]
            place[0].put(place[1], token)

    def _fail(self, message: wire.Message) -> None:
        place = self._streams.pop(message["job"], None)
        if place is None:
            return
        if message["kind"] == "refused":
            place[0].fail(JobRefused(message["message"], param=message["param"]))
        else:
            place[0].fail(EngineFailure(message["message"]))

    async def _end_worker(self) -> None:
        """The worker is gone, or goes now; what was under way fails."""
        if self._state != "stopped":
            self._state = "down"
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is not None:
            self._process.kill()  # its socket is closed: it ends anyway
            await asyncio.to_thread(self._process.wait)
            self._process = None
        streams = {id(stream): stream for stream, _ in self._streams.values()}
        self._streams.clear()
        for stream in streams.values():
            stream.fail(EngineUnavailable("the model's worker ended; it is being started again"))


class _Stream(QueuedStream):
    """Some jobs in the worker."""

    def __init__(self, engine: BuiltInEngine, jobs: Sequence[TokenJob]) -> None:
        super().__init__(len(jobs))
        self.numbers: list[int] = []
        self._engine = engine

    def stop_job(self, index: int) -> None:
        self._engine.forget(self.numbers[index])
