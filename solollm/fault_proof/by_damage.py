"""Files of a run that are not what was written: cut, turned over, swapped, forged, gone."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from solollm.checkpoint import open_checkpoint
from solollm.fault_proof.ground import (
    BEFORE,
    SAVED,
    Fault,
    Ground,
    content_of,
    events,
    flip_bit,
    require,
    require_refused,
    require_said,
    saved,
)
from solollm.manifest import MANIFEST
from solollm.runs import Run
from solollm.strictfile import encode_json

_PLACES = 16  # of a bit, in each file
_WEIGHTS, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def _bits(ground: Ground, name: str) -> str:
    run = ground.run()
    path = saved(run, SAVED, name)
    content = path.read_bytes()
    chance = random.Random(name)
    for _ in range(_PLACES):
        path.write_bytes(content)
        flip_bit(path, chance.random())
        # A name that is turned over within the manifest is the name of what is missed.
        named = path.parent.name if name == MANIFEST else name
        require_refused(lambda: open_checkpoint(path.parent).close(), named)
    return f"{_PLACES} of {_PLACES} seen; {_passed_over(ground, run, named)}"


def _cut_short(ground: Ground) -> str:
    run = ground.run()
    path = saved(run, SAVED, _WEIGHTS)
    content = path.read_bytes()
    for kept in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        require_refused(lambda: open_checkpoint(path.parent).close(), _WEIGHTS)
    path.write_bytes(content[: len(content) // 2])
    return _passed_over(ground, run, _WEIGHTS)


def _missing(ground: Ground) -> str:
    run = ground.run()
    saved(run, SAVED, _OPTIMIZER).unlink()
    return _passed_over(ground, run, _OPTIMIZER)


def _swapped(ground: Ground) -> str:
    run = ground.run()
    shutil.copyfile(saved(run, BEFORE, _OPTIMIZER), saved(run, SAVED, _OPTIMIZER))
    return _passed_over(ground, run, _OPTIMIZER)


def _crafted(ground: Ground) -> str:
    run = ground.run()
    path = saved(run, SAVED, _WEIGHTS)
    for reason, content in _crafted_files().items():
        path.write_bytes(content)
        ended = ground.live("runs", "verify", str(run), code=3)
        require_said(ended, path.parent.name, _WEIGHTS, reason)
    seen = _passed_over(ground, run, _WEIGHTS)
    return f"{len(_crafted_files())} forged headers refused by their reason; {seen}"


def _all_damaged(ground: Ground) -> str:
    run = ground.run()
    names = {BEFORE: _WEIGHTS, SAVED: _OPTIMIZER}
    whole = {step: saved(run, step, name).read_bytes() for step, name in names.items()}
    for step, name in names.items():
        flip_bit(saved(run, step, name), 0.7)
    before = content_of(run)
    ended = ground.resume(run, code=3)
    require_said(ended, "is intact", *(saved(run, step).name for step in names), *names.values())
    require(content_of(run) == before, "a refused run was changed")
    for step, name in names.items():
        saved(run, step, name).write_bytes(whole[step])
    ground.goes_on(run)
    return f"exit code 3, nothing changed; once mended, went on from step {SAVED}"


def _gone(ground: Ground) -> str:
    run = ground.run()
    elsewhere = ground.folder / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    before = content_of(run)
    ended = ground.resume(run, code=3)
    require_said(ended, f"had saved up to step {SAVED}")
    require(content_of(run) == before, "a refused run was changed")
    if (run / "checkpoints").exists():
        (run / "checkpoints").rmdir()
    elsewhere.rename(run / "checkpoints")
    ground.goes_on(run)
    return f"exit code 3, nothing begun anew; put back, went on from step {SAVED}"


def _torn_line(ground: Ground, name: str, tail: bytes) -> str:
    run = ground.run()
    with (run / name).open("ab") as file:
        file.write(tail)
    ground.goes_on(run)
    lines = (run / name).read_bytes().splitlines()
    broken = [line for line in lines if not line.endswith(b"}")]
    if name == "metrics.jsonl":
        require(bool(events(run, "metrics_mended")), "nobody was told that a line was dropped")
        require(not broken, f"there are broken lines still: {broken[:1]}")
    require(broken in ([], [tail]), f"another line is broken: {broken[:2]}")
    return f"went on from step {SAVED}, every other line is there"


def _damaged_settings(ground: Ground) -> str:
    run = ground.run()
    path = run / "run.toml"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\n= [")
    before = content_of(run)
    ended = ground.resume(run, code=2)
    require_said(ended, "run.toml")
    require(content_of(run) == before, "a refused run was changed")
    path.write_bytes(content)
    ground.goes_on(run)
    return f"exit code 2; put back, went on from step {SAVED}"


def _damaged_records(ground: Ground) -> str:
    run = ground.run()
    for path in (run / "plan.json", run / "lineage.json"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    ended = ground.resume(run, code=3)
    require_said(ended, "lineage.json", "move it away")
    (run / "lineage.json").unlink()
    ground.goes_on(run)
    require(bool(Run.open(run).read_plan()), "the plan is not written anew")
    return f"exit code 3 for the lineage; without it, went on from step {SAVED}"


def _passed_over(ground: Ground, run: Path, name: str) -> str:
    """The run must say what it passes over, and go on from the checkpoint before."""
    folder = saved(run, SAVED).name
    ended = ground.goes_on(run, step=BEFORE)
    require_said(ended, folder, name)
    reasons = [row["reason"] for row in events(run, "checkpoint_damaged")]
    require(len(reasons) == 1 and folder in reasons[0], f"the events say {reasons}")
    return f"passed over by name, went on from step {BEFORE}"


def _crafted_files() -> Mapping[str, bytes]:
    """Reason to a file that a framework's own reader may take, or end by."""

    def file(text: str, data: bytes = b"") -> bytes:
        encoded = text.encode()
        return struct.pack("<Q", len(encoded)) + encoded + data

    def table(name: str, shape: list[int], begin: int, end: int) -> str:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        return f'"{name}":{encode_json(entry).decode().strip()}'

    pair = f"{{{table('a', [2], 0, 8)},{table('b', [2], 4, 12)}}}"
    twice = f"{{{table('a', [1], 0, 4)},{table('a', [1], 0, 4)}}}"
    return {
        "overlaps": file(pair, bytes(12)),
        "a header of 9,223,372,036,854,775,808 bytes": struct.pack("<Q", 1 << 63) + b"{}",
        "the file is cut short": file(f"{{{table('a', [1024], 0, 4096)}}}", bytes(8)),
        "overflows": file(f"{{{table('a', [65536] * 4, 0, 0)}}}"),
        "twice": file(twice, bytes(4)),
    }


def _bit_fault(name: str, file: str) -> Fault:
    provoke: Callable[[Ground], str] = partial(_bits, name=file)
    return Fault(f"bit-in-the-{name}", f"one bit of {file} is turned over", _DAMAGED, provoke)


_DAMAGED = "the file is named, and the checkpoint before is taken"
FAULTS = (
    _bit_fault("weights", _WEIGHTS),
    _bit_fault("optimizer", _OPTIMIZER),
    _bit_fault("state", "trainer_state.json"),
    _bit_fault("certificate", "certificate.json"),
    _bit_fault("manifest", MANIFEST),
    Fault("cut-short", "a checkpoint's weights are cut short", _DAMAGED, _cut_short),
    Fault("file-missing", "a checkpoint's optimizer file is gone", _DAMAGED, _missing),
    Fault("file-swapped", "a checkpoint holds a file of another step", _DAMAGED, _swapped),
    Fault(
        "crafted-header", "weights are replaced by files made to mislead a reader",
        f"refused with the reason, never by a crash; {_DAMAGED}", _crafted,
    ),
    Fault(
        "all-damaged", "every checkpoint is damaged",
        "exit code 3; nothing is changed and nothing begun anew", _all_damaged,
    ),
    Fault(
        "checkpoints-gone", "the folder of checkpoints is not there (a disk not mounted)",
        "exit code 3; nothing is changed and nothing begun anew", _gone,
    ),
    Fault(
        "torn-metrics", "the last line of metrics.jsonl is half written",
        "that line is dropped and said; every other stays",
        partial(_torn_line, name="metrics.jsonl", tail=b'{"kind":"train","step":16,"lo'),
    ),
    Fault(
        "zeros-in-metrics", "metrics.jsonl ends in zeros, as after a power cut",
        "they are dropped and said; every line stays",
        partial(_torn_line, name="metrics.jsonl", tail=bytes(512)),
    ),
    Fault(
        "torn-events", "the last line of events.jsonl is half written",
        "no other line is lost by it",
        partial(_torn_line, name="events.jsonl", tail=b'{"time":"2026-01-'),
    ),
    Fault("damaged-settings", "run.toml is cut", "exit code 2, with its name; nothing is changed",
          _damaged_settings),
    Fault(
        "damaged-records", "plan.json and lineage.json are cut", "the plan is made anew; for the"
        " lineage exit code 3, with its name; without it the run goes on", _damaged_records,
    ),
)  # fmt: skip
