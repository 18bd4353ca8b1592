"""What waits between an engine and a reader: in order, complete, and over when it should be."""

from __future__ import annotations

import asyncio

import pytest

from solollm.serving.token_engine import EngineFailure, QueuedStream, Token


class Jobs(QueuedStream):
    """Notes which jobs were stopped."""

    def __init__(self, num_jobs: int) -> None:
        super().__init__(num_jobs)
        self.stopped: list[int] = []

    def stop_job(self, index: int) -> None:
        self.stopped.append(index)


def token(number: int, *, last: bool = False) -> Token:
    return Token(number, 0.0, "stop" if last else None)


def test_a_slow_reader_gets_everything_in_order_and_then_the_end() -> None:
    """Guards: tokens lost, mixed or doubled between two reads; a reader that waits for ever."""

    async def read() -> None:
        jobs = Jobs(2)
        for number in range(3):
            jobs.put(0, token(number))
            jobs.put(1, token(10 + number, last=number == 2))
        taken = await jobs.next()
        assert [(i, t.id) for i, t in taken] == [(0, 0), (1, 10), (0, 1), (1, 11), (0, 2), (1, 12)]
        jobs.put(0, token(3, last=True))
        assert [(i, t.id) for i, t in await jobs.next()] == [(0, 3)]
        assert await jobs.next() == await jobs.next() == []
        await jobs.close()
        assert jobs.stopped == []

    asyncio.run(asyncio.wait_for(read(), 10))


def test_a_waiting_reader_is_woken() -> None:
    """Guards: news that comes between the look and the wait."""

    async def read() -> None:
        jobs = Jobs(1)
        for change in (lambda: jobs.put(0, token(5)), lambda: jobs.end(0)):
            reader = asyncio.create_task(jobs.next())
            await asyncio.sleep(0)
            assert not reader.done()
            change()
            assert len(await reader) == (0 if not jobs._open else 1)

    asyncio.run(asyncio.wait_for(read(), 10))


def test_a_cancelled_job_is_stopped_and_leaves_nothing() -> None:
    """Guards: tokens of a job that nobody reads any more, and a job that runs on."""

    async def read() -> None:
        jobs = Jobs(3)
        for index in range(3):
            jobs.put(index, token(index, last=index == 2))
        jobs.cancel(1)
        jobs.cancel(2)
        assert [(i, t.id) for i, t in await jobs.next()] == [(0, 0)]
        await jobs.close()
        assert jobs.stopped == [1, 2, 0]
        assert await jobs.next() == []

    asyncio.run(asyncio.wait_for(read(), 10))


def test_an_error_comes_after_what_was_there_and_stops_the_rest() -> None:
    """Guards: an error that swallows tokens, or leaves the other jobs of a request running."""

    async def read() -> None:
        jobs = Jobs(2)
        jobs.put(0, token(1))
        jobs.fail(EngineFailure("broken"))
        assert [(i, t.id) for i, t in await jobs.next()] == [(0, 1)]
        with pytest.raises(EngineFailure, match="broken"):
            await jobs.next()
        assert jobs.stopped == [0, 1]

    asyncio.run(asyncio.wait_for(read(), 10))
