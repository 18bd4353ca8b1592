"""A run: one directory with its configuration, plan, lineage, logs, lock and checkpoints.

    run.toml       the resolved configuration         metrics.jsonl  one row per logged step
    plan.json      what the planner decided           events.jsonl   what happened, with times
    lineage.json   which environment did which steps  lock           who is writing
    checkpoints/   see `solollm.checkpoint`

Nothing in it names a place on this machine, so that a run can be moved. Logs are appended without
a flush: a crash may cost their last lines and never more, and `rewind_metrics` mends them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from solollm import durable
from solollm.checkpoint import list_checkpoints
from solollm.config import RunConfig, dump_config, parse_config
from solollm.errors import ConfigError, IntegrityError, SoloLLMError, quoted
from solollm.runlock import lock_file, read_holder
from solollm.strictfile import encode_json, parse_json, read_bytes, refused

Row = dict[str, Any]
RunState = Literal["new", "running", "stopped", "failed", "finished", "unreadable"]
_CONFIG = "run.toml"
_TAIL_BYTES = 1 << 18
_WITHOUT_RECORD = "it is a record and no more: move it away, and the run goes on without it"
_ENDINGS = ("failed", "stopped")
_GOING_ON = ("resumed", "checkpoint_saved", "restarted")  # after an ending: it is no longer one


class Run:
    """An existing run directory. Methods that write are for the holder of `lock()`."""

    writes = True  # or it is another process's to write (`solollm.ranks`)

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> Run:
        """Start a run directory. Raises ConfigError if there is one, StorageError from the disk."""
        if (path / _CONFIG).exists():
            raise ConfigError(
                f"{path} holds a run already",
                why="a new run never writes over another",
                fix=f"`solollm resume {quoted(path)}` goes on with it; or choose another name",
            )
        durable.make_directory(path / "checkpoints")
        durable.replace_file(path / _CONFIG, dump_config(config).encode())
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open a run. Raises ConfigError if there is none or its `run.toml` cannot be used."""
        if not (path / _CONFIG).is_file():
            raise ConfigError(
                f"{path} is no run",
                why=f"it holds no {_CONFIG}",
                fix="`solollm runs list` shows the runs there are",
            )
        content = read_bytes(path / _CONFIG)
        try:
            raw = tomllib.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"cannot parse {path / _CONFIG}", why=str(error)) from error
        return cls(path, parse_config(raw))

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.path / "checkpoints"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the run's only writer; what a crash left behind is tidied first. Raises RunLocked."""
        with lock_file(self.path / "lock"):
            tidied = [*durable.clean_stale(self.path), *durable.clean_stale(self.checkpoints)]
            if tidied:
                self.append_event("tidied", done=tidied)
            yield

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Log one row; `step` is the step it belongs to. NaN and infinity become null."""
        _append(self.path / "metrics.jsonl", row)

    def read_metrics(self) -> list[Row]:
        """Every whole row, oldest first."""
        return _read_rows(self.path / "metrics.jsonl")[0]

    def rewind_metrics(self, step: int) -> None:
        """Drop, durably, the rows of steps after `step`, which will be done again, and any line a
        crash has torn; the latter is recorded as an event."""
        path = self.path / "metrics.jsonl"
        rows, num_torn = _read_rows(path)
        kept = [row for row in rows if not _is_after(row, step)]
        if num_torn or len(kept) < len(rows):
            durable.replace_file(path, b"".join(_encode(row) + b"\n" for row in kept))
        if num_torn:
            self.append_event("metrics_mended", lines_dropped=num_torn)

    def append_event(self, kind: str, **fields: Any) -> None:
        """Log that something happened now."""
        _append(self.path / "events.jsonl", {"time": _now(), "kind": kind, **fields})

    def read_events(self) -> list[Row]:
        """Every whole event, oldest first."""
        return _read_rows(self.path / "events.jsonl")[0]

    def last_ending(self, after: float = 0.0) -> str:
        """How the run ended last, by its events later than `after` (seconds since 1970): failed,
        stopped, or "" where it goes on."""
        rows = _read_rows(self.path / "events.jsonl", _TAIL_BYTES)[0]
        rows = [row for row in rows if row.get("kind") in (*_ENDINGS, *_GOING_ON)]
        kinds = [row["kind"] for row in rows if not after or _seconds_of(row) > after]
        return str(kinds[-1]) if kinds and kinds[-1] in _ENDINGS else ""

    def locked_since(self) -> float:
        """When the lock was taken or released last, in seconds since 1970; 0 where it never was."""
        try:
            return (self.path / "lock").stat().st_mtime
        except OSError:
            return 0.0

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Store what the planner decided."""
        durable.replace_file(self.path / "plan.json", encode_json(dict(plan)))

    def read_plan(self) -> Row:
        """The stored plan; empty if there is none. Raises IntegrityError."""
        path = self.path / "plan.json"
        plan = _read_record(path) if path.exists() else {}
        if not isinstance(plan, dict):
            raise refused(path, "the JSON text", "is no table", fix=_WITHOUT_RECORD)
        return plan

    def record_lineage(self, step: int, environment: Mapping[str, Any]) -> None:
        """From `step` on the run is trained in `environment`. What was recorded for later steps is
        dropped with those steps; the same environment as before adds nothing."""
        kept = [part for part in self.read_lineage() if part["first_step"] < step]
        if not kept or kept[-1]["environment"] != environment:
            part = {"first_step": step, "time": _now(), "environment": dict(environment)}
            kept.append(part)
        durable.replace_file(self.path / "lineage.json", encode_json(kept))

    def read_lineage(self) -> list[Row]:
        """`{first_step, time, environment}` in order of steps. Raises IntegrityError."""
        path = self.path / "lineage.json"
        lineage = _read_record(path) if path.exists() else []
        if not isinstance(lineage, list) or not all(_is_lineage(part) for part in lineage):
            reason = "is no list of environments"
            raise refused(path, "the JSON text", reason, fix=_WITHOUT_RECORD)
        return lineage


class Stretch(NamedTuple):
    """Steps `first_step` to `last_step`, counted from 1, were done in one environment."""

    first_step: int
    last_step: int
    environment: Mapping[str, Any]


def stretches(lineage: Sequence[Mapping[str, Any]], last_step: int) -> list[Stretch]:
    """Which steps up to `last_step` ran where, by a run's lineage."""
    ends = [part["first_step"] for part in lineage[1:]] + [last_step]
    parts = [
        Stretch(part["first_step"] + 1, min(end, last_step), part.get("environment", part))
        for part, end in zip(lineage, ends, strict=False)  # no lineage: an end too many
    ]
    return [part for part in parts if part.first_step <= part.last_step]


class RunSummary(NamedTuple):
    """A run at a glance. `step` and `last_loss` (training, nats/token) are the last
    logged."""

    name: str
    path: Path
    step: int
    total_steps: int | None
    last_loss: float | None
    state: RunState


def list_runs(folder: Path) -> list[RunSummary]:
    """Every run directly in `folder`, by name; reads no more than the tail of each log."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [summarize(path) for path in found if (path / _CONFIG).is_file()]


def summarize(path: Path) -> RunSummary:
    """The summary of one run directory; never raises for a damaged one."""
    try:
        run = Run.open(path)
    except SoloLLMError:
        return RunSummary(path.name, path, 0, None, None, "unreadable")
    steps = [step for step, _ in list_checkpoints(run.checkpoints)]
    step, loss = steps[-1] if steps else 0, None
    for row in _read_rows(path / "metrics.jsonl", _TAIL_BYTES)[0]:
        if isinstance(row.get("step"), int):
            step = max(step, row["step"])
        if row.get("kind") != "eval" and isinstance(row.get("loss"), float):
            loss = row["loss"]
    total, holder = run.config.train.steps, read_holder(path / "lock")
    state: RunState = "stopped" if step else "new"
    if holder is not None and holder.is_alive():
        # One that hangs holds its lock; others of the same run may have said that it does.
        failed = run.last_ending(after=run.locked_since()) == "failed"
        state = "failed" if failed else "running"
    elif total is not None and step >= total:
        state = "finished"
    elif run.last_ending() == "failed":
        state = "failed"
    return RunSummary(path.name, path, step, total, loss, state)


def _read_record(path: Path) -> Any:
    try:
        return parse_json(read_bytes(path), path)
    except IntegrityError as error:
        raise IntegrityError(error.what, why=error.why, fix=_WITHOUT_RECORD) from error


def _append(path: Path, row: Mapping[str, Any]) -> None:
    durable.append_line(path, _encode(row))


def _encode(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    """`value` with NumPy scalars as numbers, paths as text, and null for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _read_rows(path: Path, tail_bytes: int | None = None) -> tuple[list[Row], int]:
    """(the whole rows, number of lines that are none); only of the last bytes if asked."""
    if not path.exists():
        return [], 0
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - (tail_bytes or sys.maxsize))
        file.seek(start)
        lines = file.read().split(b"\n")
    if start:
        del lines[0]
    rows, num_torn = [], 0
    for line in lines:
        row = _parse_row(line)
        if row is not None:
            rows.append(row)
        elif line:
            num_torn += 1
    return rows, num_torn


def _parse_row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_after(row: Row, step: int) -> bool:
    return isinstance(row.get("step"), int) and row["step"] > step


def _is_lineage(part: object) -> bool:
    if not isinstance(part, dict) or type(part.get("first_step")) is not int:
        return False
    environment = part.get("environment")
    return isinstance(environment, dict) and isinstance(environment.get("versions") or {}, dict)


def _seconds_of(row: Row) -> float:
    """When an event was, to the second; 0 where it does not say."""
    try:
        return datetime.fromisoformat(str(row.get("time"))).timestamp()
    except ValueError:
        return 0.0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
