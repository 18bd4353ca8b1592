"""A run followed from outside: whole rows only, each once, until it is no longer going."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from solollm.config import parse_config
from solollm.errors import ConfigError
from solollm.following import News, facts_of, follow
from solollm.runs import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "a", parse_config({"train": {"steps": 6, "seed": 3}}))


class _Time:
    """A clock that goes on by sleeping; at each sleep the next thing is done to the run."""

    def __init__(self, *deeds: Callable[[], object]) -> None:
        self.now = 1000.0
        self._deeds = list(deeds)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 2000.0, "it watches for ever"
        if self._deeds:
            self._deeds.pop(0)()

    def clock(self) -> float:
        return self.now


def _watch(run: Run, *deeds: Callable[[], object], wait: bool = False) -> tuple[list[News], float]:
    """All news, and for how long it watched after the last deed at the earliest."""
    time = _Time(*deeds)
    news = list(follow(run.path, wait=wait, sleep=time.sleep, clock=time.clock))
    return news, time.now - 1000.0


def _log(run: Run, *steps: int) -> None:
    for step in steps:
        run.append_metrics({"kind": "train", "step": step, "loss": 10.0 - step})


def _write(run: Run, content: bytes) -> None:
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(content)


def _steps(news: list[News]) -> list[list[int]]:
    return [[row["step"] for row in part.rows] for part in news]


def _files(run: Run) -> dict[str, tuple[bytes, int]]:
    found = (path for path in run.path.rglob("*") if path.is_file())
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_rows_come_once_and_only_when_they_are_whole(run: Run) -> None:
    """A half-written line told, dropped, or told twice; a watcher that keeps polling after the
    last step; one that waits at the first look."""
    lock = ExitStack()
    lock.enter_context(run.lock())
    _log(run, 1, 2)
    line = json.dumps({"kind": "train", "step": 4, "loss": 6.0}).encode() + b"\n"

    def halfway() -> None:
        _log(run, 3)
        _write(run, line[:20])

    def ended() -> None:
        _log(run, 5, 6)
        lock.close()

    nothing = list
    news, _ = _watch(run, halfway, nothing, lambda: _write(run, line[20:]), ended)
    assert news[0].past is not None
    assert [row["step"] for row in news[0].past] == [1, 2]
    assert _steps(news) == [[], [3], [4], [5, 6]]
    assert [part.state for part in news] == ["running", "running", "running", "finished"]
    assert all(part.past is None for part in news[1:])


def test_a_run_before_its_first_step_is_waited_for(run: Run) -> None:
    """A watcher that ends, or a traceback, where no log is there yet."""
    lock = ExitStack()
    lock.enter_context(run.lock())
    news, _ = _watch(run, *[list] * 50, lambda: _log(run, 1), lambda: _log(run, 6), lock.close)
    assert _steps(news)[:3] == [[], [1], [6]]
    assert (news[0].state, news[0].step) == ("running", 0)
    assert news[-1].state == "finished"


def test_a_killed_run_is_left_after_a_moment(run: Run) -> None:
    """A watcher that stays for ever with a run whose process is gone; one that takes a torn last
    row for a row."""
    lock = ExitStack()
    lock.enter_context(run.lock())

    def killed() -> None:
        _log(run, 2)
        _write(run, b'{"kind":"train","step":3,"lo')
        lock.close()

    news, seconds = _watch(run, lambda: _log(run, 1), killed)
    assert _steps(news) == [[], [1], [2]]
    assert (news[-1].state, news[-1].step, news[-1].ending) == ("stopped", 2, "")
    assert 2.0 < seconds < 5.0


def test_a_resumed_run_goes_back_to_its_checkpoint(run: Run) -> None:
    """Steps that are done again taken for old ones, or the old ones told twice; a curve of steps
    that no longer hold."""
    first, second = ExitStack(), ExitStack()
    first.enter_context(run.lock())
    _log(run, 1, 2)

    def stopped() -> None:
        run.append_event("stopped", step=4, signal="SIGINT")
        first.close()

    def resumed() -> None:
        second.enter_context(run.lock())
        run.rewind_metrics(3)
        run.append_event("resumed", step=3)
        run.append_metrics({"kind": "train", "step": 4, "loss": 5.5})

    def finished() -> None:
        _log(run, 5, 6)
        second.close()

    news, _ = _watch(run, lambda: _log(run, 3, 4), stopped, resumed, finished)
    assert _steps(news) == [[], [3, 4], [], [4], [5, 6]]
    back = news[3]
    assert back.past is not None
    assert [row["step"] for row in back.past] == [1, 2, 3]
    assert back.rows[0]["loss"] == 5.5
    assert [row["kind"] for part in news for row in part.events] == ["stopped", "resumed"]
    assert [part.state for part in news[2:4]] == ["stopped", "running"]


def test_a_supervised_run_is_waited_for_between_two_lives(run: Run) -> None:
    """A watcher that leaves in the pause before a restart, or never when it does not come."""
    lock = ExitStack()
    lock.enter_context(run.lock())

    def killed() -> None:
        lock.close()
        run.append_event("restarted", cause="killed")

    _, seconds = _watch(run, lambda: _log(run, 1), killed)
    assert 120 < seconds < 200
    lock.enter_context(run.lock())

    def back() -> None:
        lock.enter_context(run.lock())

    def ended() -> None:
        _log(run, 6)
        lock.close()

    news, _ = _watch(run, killed, *[list] * 100, back, ended)
    assert [part.state for part in news] == ["running", "stopped", "running", "finished"]


def test_a_run_that_stands_still_is_told_at_once_or_waited_for(run: Run) -> None:
    """A watcher that hangs at a run that nobody trains; `wait` that does not."""
    _log(run, 1)
    run.append_event("failed", reason="a rank is lost")
    before = _files(run)
    news, seconds = _watch(run)
    assert [(part.state, part.ending) for part in news] == [("failed", "failed")]
    assert seconds == 0.0
    assert _files(run) == before

    news, seconds = _watch(run, *[list] * 500, lambda: _log(run, 6), wait=True)
    assert seconds > 200
    assert _steps(news) == [[], [6]]


@pytest.mark.parametrize(
    "line", [b"\0" * 50, b"{" * 10_000, b"[1]", b'{"step":"3"}', b'{"kind":"train"}', b"\xff"]
)
def test_what_is_no_row_is_passed_over(run: Run, line: bytes) -> None:
    """Debris of a power cut that ends a watch."""
    with run.lock():
        _write(run, line + b"\n")
        _log(run, 1)
        time = _Time()
        watch = follow(run.path, sleep=time.sleep, clock=time.clock)
        assert [row["step"] for row in next(watch).past or ()] == [1]
        _write(run, line + b"\n" + b'{"kind":"train","step":2,"loss":NaN}\n')
        assert next(watch).rows == [{"kind": "train", "step": 2, "loss": None}]


def test_a_run_that_vanishes_is_left(run: Run, tmp_path: Path) -> None:
    """A folder moved away under a watcher: it polls for ever, or a traceback."""
    with pytest.raises(ConfigError, match="is no run"):
        list(follow(tmp_path / "none"))
    with run.lock():
        _log(run, 1)
        news, _ = _watch(run, lambda: run.path.rename(tmp_path / "b"))
    assert news[-1].state == "unreadable"


def test_facts_say_what_is_known(run: Run) -> None:
    """A watcher that needs a record which is not written yet, or is damaged."""
    assert facts_of(run.path) == {
        "run": "a", "state": "new", "start_step": 0, "total_steps": 6,
    }  # fmt: skip
    run.record_lineage(0, {"backend": "torch", "device": "cpu"})
    assert facts_of(run.path)["backend"] == "torch"
    (run.path / "lineage.json").write_text("{")
    assert "backend" not in facts_of(run.path)
