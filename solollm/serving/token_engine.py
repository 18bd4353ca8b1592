"""The seam of serving: token ids go in, token ids come out, whatever computes them.

The front (`app`, `answering`) owns text: templates, tokenizing, stop strings, tool calls, filters.
An engine owns the model: `built_in` is a worker process of our own around a backend's Decoder,
`vllm_engine` speaks to a vLLM server. So every engine answers every request in the same way.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from solollm.backend import SamplingParams

ConstraintKind = Literal["json_schema", "regex", "grammar"]
EngineState = Literal["starting", "ready", "down", "stopped"]


@dataclass(frozen=True)
class Constraint:
    """What a continuation must match: a JSON schema, a regular expression, or a Lark grammar."""

    kind: ConstraintKind
    source: str


@dataclass(frozen=True)
class TokenJob:
    """One sequence to continue.

    Attributes:
        penalties: (frequency, presence), OpenAI's, over the new tokens.
        top_logprobs: how many of the likeliest tokens are reported at each place.
        constraint: see `Constraint`; the engine ends with a stop id when nothing may follow.
        adapter: a name of `EngineInfo.adapters`.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams
    stop_ids: frozenset[int]
    penalties: tuple[float, float] = (0.0, 0.0)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0
    constraint: Constraint | None = None
    adapter: str | None = None


class Token(NamedTuple):
    """One new token; `id` is -1 where a sequence ends without one. `alternatives`: the likeliest
    ids with their log-probabilities, likeliest first."""

    id: int
    logprob: float
    finish_reason: Literal["stop", "length"] | None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself once it is ready. `device`: what it runs on, in words."""

    name: str
    device: str
    max_seq_len: int
    max_batch_size: int
    adapters: tuple[str, ...] = ()


class EngineUnavailable(Exception):
    """The engine is not there now, or went away in the middle; it is on its way back."""

    def __init__(self, message: str, *, retry_after: int = 2) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineBusy(Exception):
    """Everything that may wait is waiting."""


class JobRefused(Exception):
    """The engine cannot run this job; `param` names the request's field to blame."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class EngineFailure(Exception):
    """The engine is well but failed at this job."""


class TokenStream(ABC):
    """The tokens of some jobs, as they come."""

    @abstractmethod
    async def next(self) -> Sequence[tuple[int, Token]]:
        """What came since the last call, at least one (index of the job, token); empty once every
        job has ended.

        Raises:
            EngineUnavailable, JobRefused, EngineFailure: and the stream is over.
        """

    @abstractmethod
    def cancel(self, index: int) -> None:
        """Stop one job; nothing more comes of it."""

    @abstractmethod
    async def close(self) -> None:
        """Stop what still runs."""


class QueuedStream(TokenStream):
    """A stream that an engine puts tokens into. What a slow reader has not taken waits here,
    bounded by the jobs."""

    def __init__(self, num_jobs: int) -> None:
        self._waiting: list[tuple[int, Token]] = []
        self._open = set(range(num_jobs))
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @abstractmethod
    def stop_job(self, index: int) -> None:
        """Take a job out of the engine; nothing where it has ended."""

    def put(self, index: int, token: Token) -> None:
        """A token, or the last one, of a job."""
        self._waiting.append((index, token))
        if token.finish_reason is not None:
            self._open.discard(index)
        self._news.set()

    def end(self, index: int) -> None:
        """Nothing more comes of a job, whatever came."""
        self._open.discard(index)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """The stream is over for this reason, once what came before it is read."""
        self._error = error
        self._news.set()

    async def next(self) -> Sequence[tuple[int, Token]]:
        while True:
            if self._waiting:
                taken, self._waiting = self._waiting, []
                return taken
            if self._error is not None:
                await self.close()
                raise self._error
            if not self._open:
                return []
            self._news.clear()
            await self._news.wait()

    def cancel(self, index: int) -> None:
        self.stop_job(index)
        self._waiting = [pair for pair in self._waiting if pair[0] != index]
        self.end(index)

    async def close(self) -> None:
        running, self._open = self._open, set()
        for index in running:
            self.stop_job(index)


class TokenEngine(ABC):
    """One model behind the server."""

    @property
    @abstractmethod
    def info(self) -> EngineInfo: ...

    @property
    @abstractmethod
    def state(self) -> EngineState: ...

    @property
    @abstractmethod
    def num_active(self) -> int:
        """Jobs under way, the waiting ones included."""

    @property
    @abstractmethod
    def num_restarts(self) -> int:
        """How often it came back."""

    @abstractmethod
    async def start(self) -> None:
        """Bring it up; returns when it is ready. Raises the SoloLLMError that forbids it."""

    @abstractmethod
    async def stop(self) -> None: ...

    @abstractmethod
    async def open(self, jobs: Sequence[TokenJob]) -> TokenStream:
        """Begin jobs.

        Raises:
            EngineUnavailable: it is not there.
            EngineBusy: as many jobs wait as may.
        """
