"""`solollm runs watch`: what a terminal, a file and a machine are shown of a run from outside."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from solollm.cli import main
from solollm.config import parse_config
from solollm.following import follow
from solollm.report.console import ConsoleSink
from solollm.runs import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "a b", parse_config({"train": {"steps": 4, "seed": 3}}))
    _log(run, 1, 2)
    return run


@pytest.fixture
def at_each_sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What happens to the run while the watcher sleeps: one thing at each time."""

    def plan(*deeds: Callable[[], object]) -> None:
        left = list(deeds)
        moment = [1000.0]

        def sleep(seconds: float) -> None:
            moment[0] += seconds
            if left:
                left.pop(0)()

        assert follow.__kwdefaults__ is not None
        monkeypatch.setitem(follow.__kwdefaults__, "sleep", sleep)
        monkeypatch.setitem(follow.__kwdefaults__, "clock", lambda: moment[0])

    return plan


def _log(run: Run, *steps: int) -> None:
    for step in steps:
        run.append_metrics({"kind": "train", "step": step, "loss": 10.0 - step, "lr": 0.1})


def test_a_file_gets_a_line_per_row_and_the_end(
    run: Run, at_each_sleep: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows left out that came fast, and an exit code that hides that the run has stopped."""
    lock = ExitStack()
    lock.enter_context(run.lock())

    def stopped() -> None:
        run.append_event("stopped", step=3, signal="SIGTERM")
        lock.close()

    at_each_sleep(lambda: _log(run, 3), stopped)
    assert main(["runs", "watch", str(run.path)]) == 75
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("watching a b")
    assert [line.split()[1] for line in lines[1:3]] == ["2/4", "3/4"]
    assert lines[3].strip() == "stopped by SIGTERM after step 3"
    assert lines[4].endswith(f"has stopped: step 3 of 4; `solollm resume '{run.path}'` goes on")
    assert len(lines) == 5


def test_a_machine_gets_new_rows_events_and_states(
    run: Run, at_each_sleep: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Prose between the lines of JSON; an end that does not say which."""
    lock = ExitStack()
    lock.enter_context(run.lock())

    def ended() -> None:
        run.append_metrics({"kind": "eval", "step": 4, "loss": 6.0})
        lock.close()

    at_each_sleep(lambda: _log(run, 3, 4), ended)
    assert main(["runs", "watch", str(run.path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = ["start", "train", "train", "eval", "state", "finish"]
    assert [row["kind"] for row in rows] == kinds
    assert (rows[0]["state"], rows[0]["start_step"]) == ("running", 2)
    assert rows[-1] == {"kind": "finish", "status": "finished", "step": 4, "total_steps": 4}


def test_a_run_whose_process_is_gone_is_said_to_have_stopped(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed run that looks as if it had saved, or as if it went on."""
    assert main(["runs", "watch", str(run.path)]) == 75
    assert "(its process ended without a word): step 2 of 4" in capsys.readouterr().out
    run.append_event("failed", reason="a rank is lost")
    assert main(["runs", "watch", str(run.path)]) == 1
    assert "has failed: step 2 of 4" in capsys.readouterr().out


def test_ctrl_c_leaves_the_run_as_it_is(
    run: Run, at_each_sleep: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A watcher that stops the run, or ends with a traceback; one that writes into it."""
    with run.lock():
        before = sorted(path.name for path in run.path.iterdir())
        at_each_sleep(lambda: signal.raise_signal(signal.SIGINT))
        assert main(["runs", "watch", str(run.path)]) == 130
        assert "no longer watched" in capsys.readouterr().out
        assert sorted(path.name for path in run.path.iterdir()) == before
        assert run.read_events() == []


def test_a_block_forgets_the_steps_that_were_taken_back() -> None:
    """A curve with a saw-tooth at each resume, and a held-out loss of weights that are gone."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    sink = ConsoleSink(console)
    sink.start({"run": "a", "total_steps": 40, "doing": "watching"})
    rows = [
        {"kind": "train", "step": step, "loss": 9.0 - step, "elapsed_seconds": 2.0 * step}
        for step in range(1, 5)
    ]
    sink.recall([*rows, {"kind": "eval", "step": 4, "loss": 8.25}])
    sink.recall(rows[:2])
    sink.finish({})
    assert isinstance(console.file, io.StringIO)
    before, _, after = console.file.getvalue().partition("8.250")
    assert "watching a" in before
    assert "step 4 of 40, 1 min 12 s left" in before
    assert "8.250" not in after
    assert "step 2 of 40, 1 min 16 s left" in after


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "train", "step": 3, "loss": "\x1b[2J", "lr": "much", "memory_bytes": [1]},
        {"kind": "train", "step": 3, "loss": 10**400, "lr": float("inf"), "elapsed_seconds": {}},
        {"kind": "sample", "step": 3, "prompt": None, "text": "\x1b[2J"},
        {"kind": "eval", "step": 3, "loss": None, "bits_per_byte": "\x1b[2J"},
    ],
)
def test_a_log_of_another_hand_steers_no_terminal(run: Run, row: dict[str, object]) -> None:
    """A stranger's run, once unpacked, that clears the screen or ends the watch."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    sink = ConsoleSink(console)
    sink.start({"run": "a\x1b[2J", "total_steps": 4})
    sink.recall([row, row, row])
    sink.metrics(row)
    sink.event({"kind": "heat", "level": "\x1b[2J", "duty": "\x1b[2J"})
    sink.event({"kind": "\x1b[2J"})
    sink.finish({})
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[2J" not in console.file.getvalue()
