"""Disks that are full, fail, or lose what was not flushed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from solollm.checkpoint import latest_checkpoint
from solollm.fault_proof.arming import fail_call, limit_file_size, record_writes, recorded
from solollm.fault_proof.ground import (
    BEFORE,
    NEXT,
    SAVED,
    STEPS,
    Fault,
    Ground,
    ends_of,
    half_saved,
    require,
    require_intact,
    require_said,
    saved,
)
from solollm.fault_proof.lives import LONGEST_SECONDS, CannotBeProvoked, Ended
from solollm.manifest import MANIFEST
from solollm.testing.crashes import CrashModel, Tree, choices, write_tree

_STATES = 60  # moments of the cut, by chance; how it falls is chance too
_MOUNT = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"]
# A file system of its own for the run; both lives and the look in between happen inside.
_IN_A_SMALL_ROOM = """
set -e
mount -t tmpfs -o size=$1 tmpfs "$2"
cp -R "$3/." "$2"
$4 -m solollm resume "$2" --unsupervised > "$5/full.txt" 2>&1 && code=0 || code=$?
echo $code > "$5/full.code"
cp -R "$2" "$5/after"
mount -o remount,size=1g "$2"
$4 -m solollm resume "$2" --unsupervised > "$5/room.txt" 2>&1 && code=0 || code=$?
echo $code > "$5/room.code"
cp -R "$2" "$5/end"
"""


def _full(ground: Ground, name: str) -> str:
    run = ground.run()
    pattern = f"*{saved(run, NEXT).name}*/{name}"
    ended = ground.resume(run, arm=partial(fail_call, "write", pattern, errno.ENOSPC), code=74)
    require_said(ended, "cannot write", os.strerror(errno.ENOSPC), "free some space")
    return _older_are_whole(ground, run)


def _full_log(ground: Ground) -> str:
    run = ground.run()
    full = partial(fail_call, "write", "*/metrics.jsonl", errno.ENOSPC)
    ended = ground.resume(run, arm=full, code=74)
    require_said(ended, "metrics.jsonl", os.strerror(errno.ENOSPC))
    return _older_are_whole(ground, run)


def _failing_flush(ground: Ground) -> str:
    run = ground.run()
    pattern = f"*{saved(run, NEXT).name}*/optimizer.safetensors"
    ended = ground.resume(run, arm=partial(fail_call, "sync", pattern, errno.EIO), code=74)
    require_said(ended, os.strerror(errno.EIO), "the disk reports a fault")
    return _older_are_whole(ground, run)


def _size_limit(ground: Ground) -> str:
    run = ground.run()
    limit = saved(run, SAVED, "model.safetensors").stat().st_size // 2
    ended = ground.resume(run, arm=partial(limit_file_size, limit), code=74)
    require_said(ended, os.strerror(errno.EFBIG), "ulimit -f")
    return _older_are_whole(ground, run)


def _full_file_system(ground: Ground) -> str:
    _require_small_rooms(ground.folder)
    run, room = ground.run(), ground.folder / "room" / "run"
    # Room for one more checkpoint and for the logs, not for two.
    size = sum(path.stat().st_size + 4096 for path in run.rglob("*"))
    size += int(1.7 * sum(path.stat().st_size for path in saved(run, SAVED).iterdir()))
    room.mkdir(parents=True)
    ground.change_settings(run, data={"corpus": str(ground.base.corpus.resolve())})
    words = [str(size), str(room), str(run), sys.executable, str(ground.folder)]
    done = subprocess.run(
        [*_MOUNT, "sh", "-c", _IN_A_SMALL_ROOM, "sh", *words], check=False, capture_output=True,
        text=True, timeout=2 * LONGEST_SECONDS,
    )  # fmt: skip
    require(done.returncode == 0, f"the room could not be made: {done.stderr}")
    ended = _ended(ground.folder, "full")
    require(ended.code == 74, f"it ended with {ended.code}, not 74: {ended.shown}")
    require_said(ended, "not enough disk space", "bytes are needed", "free some space")
    require_intact(ground.folder / "after", BEFORE, SAVED, NEXT)
    ended = _ended(ground.folder, "room")
    require(ended.code == 0, f"with room again it ended with {ended.code}: {ended.shown}")
    ground.same_end(ground.folder / "end")
    return f"exit code 74 before the save of step {STEPS}, went on from step {NEXT}"


def _read_only(ground: Ground) -> str:
    if os.geteuid() == 0:
        raise CannotBeProvoked("permissions do not bind root")
    run = ground.run()
    folders = [run, run / "checkpoints"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for folder in folders:
        folder.chmod(0o555)
    try:
        ended = ground.resume(run, code=74)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    require_said(ended, os.strerror(errno.EACCES))
    kept = all(path.read_bytes() == content for path, content in before.items()
               if "checkpoints" in path.parts)  # fmt: skip
    require(kept, "a checkpoint has changed")
    ground.goes_on(run)
    return f"exit code 74, then went on from step {SAVED}"


def _power_cut(ground: Ground) -> str:
    run = ground.run()
    model = CrashModel(run)  # as the disk is before
    with ground.life(
        "resume", str(run), "--unsupervised", arm=partial(record_writes, NEXT)
    ) as life:
        ended = life.end()
    require(ended.code == 0 and life.mark.exists(), f"nothing was recorded: {ended.shown}")
    chance = random.Random(0)
    states = list(_states(model, life.mark, chance))
    place = ground.folder / "cut-off"
    for is_acknowledged, tree in states:
        if place.exists():
            shutil.rmtree(place)
        place.mkdir()
        write_tree(tree, place)
        found, damaged = latest_checkpoint(place / "checkpoints")
        step = found.step if found else 0
        if found:
            found.close()
        least = NEXT if is_acknowledged else SAVED
        require(step >= least, f"step {least} was acknowledged and {step} is found: {damaged}")
    shutil.rmtree(run)
    place.rename(run)
    ground.resume(run)
    # Rows are not flushed: a power cut may cost those before it, and never more.
    kept = {step: loss for step, loss in ground.base.ends.losses.items()
            if step in ends_of(run).losses or step > NEXT}  # fmt: skip
    ground.same_end(run, other=ground.base.ends._replace(losses=kept))
    return f"{len(states)} states, in none was an acknowledged checkpoint lost"


def _states(model: CrashModel, log: Path, chance: random.Random) -> Iterator[tuple[bool, Tree]]:
    """Some states that a power cut leaves, the last with everything done; and whether the save was
    acknowledged by then."""
    done = recorded(log)
    taken = set(chance.sample(range(len(done)), min(_STATES, len(done))))
    for number, event in enumerate(done):
        model.apply(event)
        if number in taken:
            yield False, model.state(chance.choice(list(choices(4, number))))
    for choice in choices(4, len(done)):
        yield True, model.state(choice)


def _older_are_whole(ground: Ground, run: Path) -> str:
    require_intact(run, BEFORE, SAVED)
    require(not half_saved(run), "half a save was left on the full disk")
    ground.goes_on(run)
    return f"exit code 74, older checkpoints whole, went on from step {SAVED}"


def _require_small_rooms(place: Path) -> None:
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        raise CannotBeProvoked("needs Linux and its `unshare`")
    probe = subprocess.run(
        [*_MOUNT, "mount", "-t", "tmpfs", "tmpfs", str(place)], check=False, capture_output=True
    )
    if probe.returncode != 0:
        raise CannotBeProvoked("this system lets nobody but root mount a file system of their own")


def _ended(folder: Path, name: str) -> Ended:
    code = json.loads((folder / f"{name}.code").read_text())
    return Ended(code, (folder / f"{name}.txt").read_text())


_FULL = "exit code 74; older checkpoints are whole; with room again the run goes on"
FAULTS = (
    Fault(
        "full-in-the-weights", "the disk is full in the middle of a save", _FULL,
        partial(_full, name="model.safetensors"),
    ),
    Fault(
        "full-in-the-manifest", "the disk is full at the last file of a save", _FULL,
        partial(_full, name=MANIFEST),
    ),
    Fault("full-in-the-log", "the disk is full while a row is logged", _FULL, _full_log),
    Fault(
        "full-file-system", "a real file system with room for one checkpoint, not two",
        "exit code 74 before anything is written, with the bytes needed and free; then as above",
        _full_file_system,
    ),
    Fault("file-size-limit", "the system refuses files of that size (ulimit -f)", _FULL,
          _size_limit),
    Fault("failing-flush", "the disk fails to flush a finished file", _FULL, _failing_flush),
    Fault("read-only-folder", "the run's folder cannot be written to", "exit code 74; nothing"
          " is changed; writable again, the run goes on", _read_only),
    Fault(
        "power-cut", "the power goes during a save: states that may be left are walked through",
        "an acknowledged checkpoint is never lost", _power_cut,
    ),
)  # fmt: skip
