"""A run that another process trains, followed by what it writes: its rows, its events, its state.

Read only: the lock is looked at and never taken. A row counts once its line has its end. A resume
rewrites `metrics.jsonl` without the steps that it does again; what still holds is then told anew.
Who shows it: `solollm.commands.watching`.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from solollm.errors import IntegrityError, StorageError
from solollm.runs import Row, Run, RunState, summarize

POLL_SECONDS = 0.5
GRACE_SECONDS = 2.0  # the lock is free for so long before a run counts as no longer going
RESTART_SECONDS = 130.0  # the same after a supervisor has said that it starts the run again
EXIT_CODES = {"finished": 0, "stopped": 75, "new": 75}  # any other state: 1


class News(NamedTuple):
    """What has come since the last look. `past`: the rows told before that still hold, at the first
    look all there are; None where nothing was taken back. `ending` as `Run.last_ending`."""

    state: RunState
    step: int
    past: Sequence[Row] | None
    rows: Sequence[Row]
    events: Sequence[Row]
    ending: str


def follow(
    path: Path, *, wait: bool = False, sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> Iterator[News]:  # fmt: skip
    """News of the run at `path` until it is finished or no longer going; `wait`: until it is
    finished. The first comes at once, the last has the state that it was left in.

    Raises:
        ConfigError: no run there. StorageError: one of its files cannot be read.
    """
    run = Run.open(path)
    metrics, events = _Log(path / "metrics.jsonl"), _Log(path / "events.jsonl")
    told: tuple[RunState, int] | None = None
    went = -GRACE_SECONDS  # when it was seen going last
    restarted = -RESTART_SECONDS
    while True:
        summary = summarize(path)  # before the logs: they then hold all that came before an end
        now = clock()
        kept, rows = metrics.read()
        _, happened = events.read()
        rows = [row for row in rows if isinstance(row.get("step"), int)]
        if told is None:
            kept, rows, happened = rows, [], []
        if any(row.get("kind") == "restarted" for row in happened):
            restarted = now
        if summary.state == "running":
            went = now
        place = (summary.state, summary.step)
        if kept is not None or rows or happened or place != told:
            told = place
            yield News(*place, kept, rows, happened, run.last_ending())
        if summary.state in ("finished", "unreadable"):
            return
        is_over = now - went >= GRACE_SECONDS and now - restarted >= RESTART_SECONDS
        if is_over and not wait:
            return
        sleep(POLL_SECONDS)


def facts_of(path: Path) -> Row:
    """What the run at `path` is, as sinks are told at a start (`solollm.run_log`); what is not
    known yet is left out."""
    run, summary = Run.open(path), summarize(path)
    config = run.config
    facts: dict[str, Any] = {
        "run": path.resolve().name,
        "state": summary.state,
        "start_step": summary.step,
        "total_steps": summary.total_steps,
    }
    if config.model.config is not None:
        facts["num_parameters"] = config.model.config.num_parameters()
    if config.train.batch_size and config.data.seq_len:
        facts["tokens_per_step"] = config.train.batch_size * config.data.seq_len
    with suppress(IntegrityError):  # a damaged record: the run is followed all the same
        for part in run.read_lineage()[-1:]:
            environment = part.get("environment")
            if isinstance(environment, dict):
                facts.update({k: environment[k] for k in ("backend", "device") if k in environment})
    return facts


class _Log:
    """A file of rows that grows, or is put in the place of the one before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._told = array("q")  # a hash of each whole row told: weeks of rows are many

    def read(self) -> tuple[list[Row] | None, list[Row]]:
        """(the rows told before that the file still begins with, where it is another file; None
        where it has only grown; the new whole rows)."""
        is_another, lines = self._new_lines()
        rows = [(hash(line), row) for line in lines if (row := _parse(line)) is not None]
        if not is_another:
            self._told.extend(number for number, _ in rows)
            return None, [row for _, row in rows]
        same = 0
        for told, (number, _) in zip(self._told, rows, strict=False):
            if told != number:
                break
            same += 1
        self._told = array("q", (number for number, _ in rows))
        return [row for _, row in rows[:same]], [row for _, row in rows[same:]]

    def _new_lines(self) -> tuple[bool, list[bytes]]:
        """(whether it is another file than before, its whole lines not read yet)."""
        if not self._path.is_file():  # not begun yet
            return False, []
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                place = (status.st_dev, status.st_ino)
                is_another = self._file is not None and (
                    place != self._file or status.st_size < self._offset
                )
                self._file, self._offset = place, 0 if is_another else self._offset
                file.seek(self._offset)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError as error:
            raise StorageError(f"cannot read {self._path}", why=str(error.strerror)) from error
        self._offset += len(whole) + len(end)
        return is_another, whole.split(b"\n") if end else []


def _parse(line: bytes) -> Row | None:
    """A row, NaN and infinity as null; None for what a crash has left."""
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
