"""Run directories: one writer, logs that survive a torn line, a resume without doubled steps."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from solollm import durable
from solollm.config import RunConfig, parse_config
from solollm.errors import ConfigError, IntegrityError, RunLocked, SoloLLMError
from solollm.runs import Run, list_runs, stretches

# Python 3.12 warns of forks beside threads; the children here touch no thread.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "a", parse_config({"train": {"steps": 100, "seed": 3}}))


def test_create_then_open_gives_the_same_config(run: Run) -> None:
    """Guards: a setting lost on the way through run.toml; a second run written over the first."""
    assert Run.open(run.path).config == run.config
    assert run.checkpoints.is_dir()
    with pytest.raises(ConfigError, match="holds a run already"):
        Run.create(run.path, RunConfig())


def test_open_of_no_run_says_so(tmp_path: Path) -> None:
    """Guards: a traceback where the path is misspelt or run.toml damaged."""
    with pytest.raises(ConfigError, match="is no run"):
        Run.open(tmp_path / "missing")
    (tmp_path / "run.toml").write_bytes(b"\xff\x00[")
    with pytest.raises(ConfigError, match="cannot parse"):
        Run.open(tmp_path)
    (tmp_path / "run.toml").unlink()
    os.mkfifo(tmp_path / "run.toml")
    with pytest.raises(SoloLLMError, match="is no run"):
        Run.open(tmp_path)


def test_rewind_drops_later_steps_and_torn_lines(run: Run) -> None:
    """Guards: doubled steps in metrics.jsonl after a resume; a torn line that eats its heir."""
    for step in range(1, 11):
        run.append_metrics({"step": step, "loss": step / 3})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 11, "lo')
    assert [row["step"] for row in run.read_metrics()] == list(range(1, 11))
    run.append_metrics({"step": 12, "loss": 4.0})
    assert run.read_metrics()[-1] == {"step": 12, "loss": 4.0}
    run.rewind_metrics(7)
    assert run.read_metrics() == [{"step": step, "loss": step / 3} for step in range(1, 8)]
    lines = (run.path / "metrics.jsonl").read_bytes().splitlines()
    assert all(json.loads(line) for line in lines)
    assert run.read_events()[-1]["kind"] == "metrics_mended"
    before = (run.path / "metrics.jsonl").stat().st_mtime_ns
    run.rewind_metrics(7)
    assert (run.path / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"{" * 100_000, b"[1]\n", b"\xff\xfe\n", b"null"])
def test_damaged_log_tail_costs_no_whole_row(run: Run, tail: bytes) -> None:
    """Guards: NUL blocks and other power-cut debris that make a log unreadable for good."""
    run.append_metrics({"step": 1})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    run.append_metrics({"step": 2})
    assert [row["step"] for row in run.read_metrics()] == [1, 2]
    run.rewind_metrics(1)
    assert (run.path / "metrics.jsonl").read_bytes() == b'{"step":1}\n'


def test_numbers_that_json_lacks_become_null(run: Run) -> None:
    """Guards: `NaN` in a log, which no other JSON reader takes; NumPy scalars that raise."""
    row = {"step": np.int64(3), "loss": math.nan, "lr": np.float32(0.5), "list": [math.inf, 1]}
    run.append_metrics(row)
    assert run.read_metrics() == [{"step": 3, "loss": None, "lr": 0.5, "list": [None, 1]}]


def test_lineage_follows_the_steps_of_the_weights(run: Run) -> None:
    """Guards: an environment listed for steps that were rewound; a new row at every resume."""
    run.record_lineage(0, {"backend": "torch"})
    run.record_lineage(40, {"backend": "torch"})
    run.record_lineage(60, {"backend": "mlx"})
    assert [part["first_step"] for part in run.read_lineage()] == [0, 60]
    run.record_lineage(50, {"backend": "torch"})
    assert [part["environment"] for part in run.read_lineage()] == [{"backend": "torch"}]
    (run.path / "lineage.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"lineage\.json"):
        run.read_lineage()


def test_stretches_say_which_steps_ran_where() -> None:
    """Guards what `runs show` and report.html tell of a run that moved: every step once, counted
    from 1, and nothing of an environment in which no step was done."""
    lineage = [
        {"first_step": 0, "environment": {"backend": "mlx"}},
        {"first_step": 40, "environment": {"backend": "torch"}},
        {"first_step": 60, "environment": {"backend": "mlx"}},
    ]
    told = [(p.first_step, p.last_step, p.environment["backend"]) for p in stretches(lineage, 75)]
    assert told == [(1, 40, "mlx"), (41, 60, "torch"), (61, 75, "mlx")]
    assert [part[:2] for part in stretches(lineage, 60)] == [(1, 40), (41, 60)]
    assert stretches(lineage, 0) == stretches([], 9) == []


def test_plan_round_trip(run: Run) -> None:
    """Guards: a plan that report and list cannot read back."""
    assert run.read_plan() == {}
    run.write_plan({"micro_batch_size": 2, "memory_bytes": {"weights": 10}})
    assert run.read_plan() == {"micro_batch_size": 2, "memory_bytes": {"weights": 10}}


def test_a_damaged_record_is_said_to_be_one(run: Run) -> None:
    """Guards: a run of weeks that cannot go on because of a file that only tells of it, and advice
    to get that file from elsewhere."""
    for name, read in (("plan.json", run.read_plan), ("lineage.json", run.read_lineage)):
        for content in (b"", b"{", b"3\n"):
            (run.path / name).write_bytes(content)
            with pytest.raises(IntegrityError, match="move it away"):
                read()
        (run.path / name).unlink()
        assert not read()


def test_second_writer_is_refused_and_told_who_writes(run: Run) -> None:
    """Guards: two runs in one folder; an error that does not say what to do."""
    with run.lock(), pytest.raises(RunLocked) as refusal, Run.open(run.path).lock():
        pass
    assert f"kill {os.getpid()}" in str(refusal.value)
    with run.lock():
        pass


def test_lock_of_a_dead_process_is_no_lock(run: Run) -> None:
    """Guards: a stale lock, after a crash or a move to another machine, that a human must clear."""
    for text in (
        b"", b"junk", b'{"pid": 999999999, "boot_id": "x", "started": 0}',
        json.dumps({"pid": os.getpid(), "boot_id": "another boot", "started": 0}).encode(),
    ):  # fmt: skip
        (run.path / "lock").write_bytes(text)
        with run.lock():
            pass


def test_a_clock_that_is_set_makes_no_run_a_dead_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a training that is shown as stopped after the clock of a laptop or a virtual machine
    was set; start times since 1970 are derived from it."""
    create_time = psutil.Process.create_time
    with run.lock():
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) - 7200)
        assert list_runs(run.path.parent)[0].state == "running"
        with pytest.raises(RunLocked, match=f"kill {os.getpid()}"), Run.open(run.path).lock():
            pass


def test_killed_holder_frees_the_lock(run: Run) -> None:
    """Guards: kill -9 of a run that blocks its own resume."""
    ready = FORK.Event()

    def hold() -> None:
        with run.lock():
            ready.set()
            time.sleep(60)

    child = FORK.Process(target=hold)
    child.start()
    assert ready.wait(20)
    assert list_runs(run.path.parent)[0].state == "running"
    with pytest.raises(RunLocked, match=f"process {child.pid} "), run.lock():
        pass
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert list_runs(run.path.parent)[0].state == "new"
    with run.lock():
        pass


def test_start_races_have_exactly_one_winner(run: Run) -> None:
    """Guards: a window between looking at the lock and taking it. 100 races of 4 processes."""
    num_racers, num_races = 4, 100
    start, taken = FORK.Barrier(num_racers), FORK.Barrier(num_racers)
    wins = FORK.Array("i", num_races)

    def race() -> None:
        for number in range(num_races):
            start.wait(20)
            try:
                with run.lock():
                    with wins.get_lock():
                        wins[number] += 1
                    taken.wait(20)
            except RunLocked:
                taken.wait(20)

    racers = [FORK.Process(target=race) for _ in range(num_racers)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * num_racers
    assert list(wins) == [1] * num_races


def test_taking_the_lock_tidies_what_a_crash_left(run: Run) -> None:
    """Guards: gigabytes of staged leftovers that nobody deletes."""
    (run.checkpoints / f"{durable.TEMPORARY}step-00000010-0a1b2c3d").mkdir()
    (run.path / f"{durable.TEMPORARY}plan.json-0a1b2c3d").write_bytes(b"half")
    with run.lock():
        assert list(run.checkpoints.iterdir()) == []
    assert run.read_events()[-1]["kind"] == "tidied"
    assert not list(run.path.glob(f"{durable.TEMPORARY}*"))


def test_list_runs_sums_up_each_run(run: Run, tmp_path: Path) -> None:
    """Guards: one damaged run that hides all others; the held-out loss shown as training's."""
    run.append_metrics({"step": 99, "loss": 2.0})
    run.append_metrics({"kind": "train", "step": 100, "loss": 1.5})
    run.append_metrics({"kind": "eval", "step": 100, "loss": 9.5})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.toml").write_text("not toml [")
    (tmp_path / "no_run").mkdir()
    Run.create(tmp_path / "c", RunConfig()).append_metrics({"step": 5, "loss": 3.0})
    summaries = {run.name: run for run in list_runs(tmp_path)}
    assert set(summaries) == {"a", "b", "c"}
    assert summaries["a"][2:] == (100, 100, 1.5, "finished")
    assert summaries["b"].state == "unreadable"
    assert summaries["c"][2:] == (5, None, 3.0, "stopped")


def test_appends_from_two_threads_keep_every_row(run: Run) -> None:
    """Guards: the saver's events and the trainer's rows torn into each other."""

    def write(first: int) -> Callable[[], None]:
        return lambda: [run.append_metrics({"step": first + n, "x": "y" * 300}) for n in range(200)]

    threads = [threading.Thread(target=write(first)) for first in (0, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(run.read_metrics()) == 400


def test_nothing_in_a_new_run_names_this_machine(run: Run) -> None:
    """Guards: absolute paths that break a run when it is moved."""
    with run.lock():
        run.append_metrics({"step": 1})
    for path in run.path.rglob("*"):
        if path.is_file():
            assert not re.search(str(run.path.parent), path.read_text())
