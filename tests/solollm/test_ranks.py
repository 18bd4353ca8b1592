"""What rank 0 does alone, and what the others do instead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from solollm.architecture import ModelConfig
from solollm.backend import Ranks
from solollm.checkpoint import save_checkpoint
from solollm.config import parse_config
from solollm.errors import (
    ConfigError,
    IntegrityError,
    RankLost,
    RunLocked,
    StoppedBySignal,
    StorageError,
)
from solollm.ranks import Follower, latest_for_all, locked, on_first, together
from solollm.runs import Run, summarize
from solollm.testing.snapshots import ArraySnapshot, state_at


class Scripted(Ranks):
    """One of two ranks; what the other says is written down beforehand, the last word repeated."""

    def __init__(self, rank: int, *others: Sequence[float]) -> None:
        self.rank, self.world_size = rank, 2
        self.others = [tuple(values) for values in others] or [()]
        self.asked = 0

    def largest(self, *values: float) -> tuple[float, ...]:
        other = self.others[min(self.asked, len(self.others) - 1)]
        self.asked += 1
        return tuple(map(max, values, (*other, *values[len(other) :])))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", parse_config({"train": {"steps": 10}}))


def test_a_follower_writes_nothing(run: Run) -> None:
    """Two processes that append to one file, or replace each other's."""
    follower = Follower(run.path, run.config)
    before = sorted(run.path.rglob("*"))
    with follower.lock():
        follower.append_event("stopped")
        follower.append_metrics({"step": 1})
        follower.rewind_metrics(0)
        follower.write_plan({})
        follower.record_lineage(0, {})
    assert sorted(run.path.rglob("*")) == before
    assert not follower.writes


def test_only_rank_0_does_what_is_done_once() -> None:
    """A run directory that both ranks create."""
    done: list[int] = []
    assert on_first(Scripted(0), lambda: done.append(0) or "made") == "made"
    assert on_first(Scripted(1, [0]), lambda: done.append(1)) is None
    assert done == [0]


def test_all_ranks_fail_with_rank_0() -> None:
    """A rank that waits forever for one that has ended with a message."""

    def refuse() -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        on_first(Scripted(0), refuse)
    with pytest.raises(RankLost) as caught:
        on_first(Scripted(1, [2]), refuse)
    assert caught.value.exit_code == 2


def test_the_lock_is_rank_0s(run: Run) -> None:
    """A follower that takes the lock shuts its own leader out."""
    with locked(run, Scripted(0)):
        with pytest.raises(RunLocked), locked(run, Scripted(0)):
            pass
        with locked(Follower(run.path, run.config), Scripted(1, [0])):
            pass


def test_a_failure_is_written_down(run: Run) -> None:
    """A run that died of an error looks as if somebody had stopped it."""
    with pytest.raises(StorageError), together(run, Scripted(0)):
        raise StorageError("the disk is full")
    assert run.read_events()[-1]["reason"] == "the disk is full"
    assert summarize(run.path).state == "failed"
    run.append_event("resumed", step=0)
    assert summarize(run.path).state != "failed"


def test_a_loss_that_two_threads_notice_is_written_down_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The framework raises in the thread that trains while the one that watches hears of it."""
    last_ending = Run.last_ending

    def slowly(self: Run, after: float = 0.0) -> str:
        ending = last_ending(self, after)
        time.sleep(0.05)
        return ending

    def train(_: int) -> None:
        with pytest.raises(RankLost), together(run, Scripted(0)):
            raise RankLost("it is gone")

    monkeypatch.setattr(Run, "last_ending", slowly)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(train, range(2)))
    assert [event["kind"] for event in run.read_events()] == ["failed"]


def test_a_stop_is_no_failure_and_waits_for_all(run: Run) -> None:
    """A launcher that ends rank 0 in the middle of its report because another has left."""
    ranks = Scripted(0)
    with pytest.raises(StoppedBySignal), together(run, ranks):
        raise StoppedBySignal("asked to", signal_number=15)
    with together(run, ranks):
        pass
    assert ranks.asked == 2
    assert not run.read_events()


def test_a_rank_that_is_left_speaks_for_rank_0(run: Run) -> None:
    """A leader that was killed says nothing; but while it lives, it speaks for itself."""
    follower = Follower(run.path, run.config)
    with run.lock(), pytest.raises(RankLost), together(follower, Scripted(1)):
        raise RankLost("Connection closed by peer")
    assert not run.read_events()
    for _ in range(2):
        with pytest.raises(RankLost), together(follower, Scripted(1)):
            raise RankLost("Connection closed by peer")
    assert [(e["kind"], e["rank"]) for e in run.read_events()] == [("failed", 1)]
    assert summarize(run.path).state == "failed"


def test_all_ranks_open_the_checkpoint_of_rank_0(run: Run, tiny_config: ModelConfig) -> None:
    """A rank that skips what another takes for intact goes on from another step."""
    assert latest_for_all(run, Scripted(0)) == (None, [])
    for step in (3, 6):
        save_checkpoint(
            run.checkpoints, model=tiny_config, snapshot=ArraySnapshot(tiny_config),
            state=state_at(step), tokenizer_files={}, token_ids={},
        )  # fmt: skip
    first, _ = latest_for_all(run, Scripted(0))
    other, _ = latest_for_all(run, Scripted(1, [0], [3]))
    assert first is not None
    assert other is not None
    assert (first.step, other.step) == (6, 3)
    for checkpoint in (first, other):
        checkpoint.close()
    for weights in run.checkpoints.glob("*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="no checkpoint of"):
        latest_for_all(run, Scripted(0))
    with pytest.raises(RankLost):
        latest_for_all(run, Scripted(1, [3]))
