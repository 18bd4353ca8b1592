"""The process that holds a model: a loop around one Decoder, started and watched by `built_in`.

Commands come over a socket on a thread of their own, where constraints are made too, so that the
loop never waits for a client. When the socket closes the server is gone, and so is this process.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from solollm.backend import Decoder, Engine, EngineOptions, Request, TokenEvent
from solollm.errors import ConfigError, SoloLLMError
from solollm.serving import wire
from solollm.serving.constraints import ConstraintError, ConstraintMaker, ConstraintMask
from solollm.serving.processors import JobLogits, processors_of
from solollm.serving.token_engine import EngineInfo, TokenJob


@dataclass(eq=False)
class _Running:
    """A job that the decoder has."""

    number: int
    logits: JobLogits | None


class Worker:
    """Runs jobs until the other end of `sock` closes."""

    def __init__(self, sock: socket.socket, engine: Engine, maker: ConstraintMaker) -> None:
        self._sock = sock
        self._engine = engine
        self._maker = maker
        self._decoder: Decoder = engine.open()
        self._commands: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}  # by the decoder's request id
        self._by_number: dict[int, int] = {}  # job number -> request id

    def run(self) -> None:
        """The loop; the calling thread is the one that computes."""
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            self._obey(wait=not self._running)
            if self._running:
                self._step()

    def _listen(self) -> None:
        """Commands in their order; ends the process when the server has gone."""
        while (message := wire.receive_blocking(self._sock)) is not None:
            number = message["job"]
            if message["op"] == "cancel":
                self._commands.put(("cancel", number, None))
                continue
            job, mask = wire.job_of(message), None
            if job.constraint is not None:
                try:
                    mask = self._maker.make(job.constraint)
                except ConstraintError as error:
                    self._send_failed(number, "refused", str(error), "response_format")
                    continue
            self._commands.put(("add", number, (job, mask)))
        os._exit(0)

    def _obey(self, *, wait: bool) -> None:
        """Take every command that has come; with `wait`, at least one."""
        while True:
            try:
                op, number, content = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if op == "add":
                self._add(number, *content)
            else:
                self._cancel(number)

    def _add(self, number: int, job: TokenJob, mask: ConstraintMask | None) -> None:
        processors = processors_of(job, mask)
        request = Request(
            job.prompt_ids, job.max_new_tokens, job.sampling, job.stop_ids,
            logits_processors=processors, adapter=job.adapter,
        )  # fmt: skip
        try:
            request_id = self._decoder.add(request)
        except ConfigError as error:
            self._send_failed(number, "refused", str(error))
            return
        self._running[request_id] = _Running(number, processors[0] if processors else None)
        self._by_number[number] = request_id

    def _cancel(self, number: int) -> None:
        request_id = self._by_number.pop(number, None)
        if request_id is not None:
            self._running.pop(request_id)
            self._decoder.cancel(request_id)

    def _step(self) -> None:
        try:
            events = self._decoder.step()
        except Exception as error:  # a bug or broken weights: these jobs end, the process does not
            traceback.print_exc()
            for running in self._running.values():
                self._send_failed(running.number, "failure", f"{type(error).__name__}: {error}")
            self._running.clear()
            self._by_number.clear()
            self._decoder = self._engine.open()
            return
        items = [row for event in events if (row := self._row(event)) is not None]
        if items:
            self._send({"op": "tokens", "items": items})
        self._end_broken()

    def _row(self, event: TokenEvent) -> list[Any] | None:
        """The message row of an event; None for jobs that were cancelled or have just broken."""
        running = self._running.get(event.request_id)
        if running is None or (running.logits is not None and running.logits.error):
            return None
        if event.finish_reason is not None:
            del self._running[event.request_id]
            self._by_number.pop(running.number, None)
        alternatives: list[tuple[int, float]] = []
        if running.logits is not None:
            alternatives = running.logits.alternatives(event.token, event.logprob)
        return [running.number, event.token, event.logprob, event.finish_reason, alternatives]

    def _end_broken(self) -> None:
        for running in list(self._running.values()):
            if running.logits is not None and running.logits.error:
                self._cancel(running.number)
                self._send_failed(
                    running.number, "refused", running.logits.error, "response_format"
                )

    def _send_failed(self, number: int, kind: str, message: str, param: str | None = None) -> None:
        self._send(
            {"op": "failed", "job": number, "kind": kind, "message": message, "param": param}
        )

    def _send(self, message: wire.Message) -> None:
        try:
            self._sock.sendall(wire.packed(message))
        except OSError:
            os._exit(0)  # the server has gone


def main(fd: int, checkpoint: str, settings: dict[str, Any]) -> None:
    """The child's whole life. `settings`: `backend`, and fields of EngineOptions."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server decides when to end
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    try:
        worker, info = _open(sock, Path(checkpoint), settings)
    except BaseException as error:
        with contextlib.suppress(OSError):
            sock.sendall(wire.packed({"op": "fatal", "error": _explained(error)}))
        sys.exit(1)
    sock.sendall(wire.packed({"op": "ready", "info": asdict(info)}))
    worker.run()


def _open(
    sock: socket.socket, checkpoint: Path, settings: dict[str, Any]
) -> tuple[Worker, EngineInfo]:
    from solollm.completion import open_model

    given = dict(settings["options"])
    folders = {name: Path(folder) for name, folder in given.pop("adapters", {}).items()}
    options = EngineOptions(**given, adapters=folders)
    model = open_model(checkpoint, backend=settings["backend"], options=options)
    engine, tokenizer = model.engine, model.tokenizer
    maker = ConstraintMaker(tokenizer, engine.model.vocab_size, sorted(model.stop_ids))
    info = EngineInfo(
        name="built-in",
        device=model.notes[-1],
        max_seq_len=model.max_seq_len,
        max_batch_size=engine.options.max_batch_size,
        adapters=tuple(folders),
    )
    return Worker(sock, engine, maker), info


def _explained(error: BaseException) -> dict[str, str]:
    if isinstance(error, SoloLLMError):
        kind = type(error).__name__
        return {"kind": kind, "what": error.what, "why": error.why, "fix": error.fix}
    traceback.print_exception(error)
    what = f"the model could not be loaded: {type(error).__name__}: {error}"
    return {"kind": "BackendError", "what": what, "why": "", "fix": ""}
