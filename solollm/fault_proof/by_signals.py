"""Ended, asked to end, suspended: at the worst moments."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import psutil

from solollm.checkpoint import step_name
from solollm.fault_proof.arming import (
    Call,
    hold_at_row,
    kill_in_call,
    signal_again_in_the_save,
    signal_at_row,
)
from solollm.fault_proof.ground import (
    BEFORE,
    NEXT,
    SAVED,
    Fault,
    Ground,
    events,
    half_saved,
    require,
    require_intact,
    require_said,
    saved,
    the_only,
)
from solollm.manifest import MANIFEST

_ROW = SAVED + 2  # where signals come: between two saves
_NEXT_NAME = step_name(NEXT)
_SUSPENDED_SECONDS = 0.5


def _kill_in_a_step(ground: Ground) -> str:
    run = ground.run()
    kill = partial(signal_at_row, _ROW, signal.SIGKILL)
    ground.resume(run, arm=kill, code=-signal.SIGKILL)
    require_intact(run, BEFORE, SAVED)
    ground.goes_on(run)
    return f"killed in step {_ROW + 1}, went on from step {SAVED}"


def _kill_in_a_save(ground: Ground) -> str:
    staging = _killed_in_save(ground, "write", f"*{_NEXT_NAME}*/model.safetensors")
    require(not (staging / MANIFEST).exists(), "the save was whole already")
    ground.goes_on(ground.folder / "run")
    return f"half a save of step {NEXT} removed, went on from step {SAVED}"


def _kill_in_the_manifest(ground: Ground) -> str:
    staging = _killed_in_save(ground, "write", f"*{_NEXT_NAME}*/{MANIFEST}")
    size = (staging / MANIFEST).stat().st_size
    whole = saved(ground.folder / "run", SAVED, MANIFEST).stat().st_size
    require(0 < size < whole, "the manifest was not cut")
    ground.goes_on(ground.folder / "run")
    return f"{size} bytes of the manifest stood, went on from step {SAVED}"


def _kill_before_the_name(ground: Ground) -> str:
    staging = _killed_in_save(ground, "rename", f"*/{_NEXT_NAME}")
    require((staging / MANIFEST).exists(), "the save was not finished")
    ground.goes_on(ground.folder / "run")
    return f"a save without its name removed, went on from step {SAVED}"


def _kill_in_the_pruning(ground: Ground) -> str:
    run = ground.run(checkpoint={"keep_latest": 2, "keep_best": False})
    pruning = partial(kill_in_call, "unlink", f"*{saved(run, BEFORE).name}/config.json")
    ground.resume(run, arm=pruning, code=-signal.SIGKILL)
    require(saved(run, BEFORE, "config.json").exists(), "the old checkpoint was gone already")
    require(not saved(run, BEFORE, MANIFEST).exists(), "the manifest did not go first")
    ground.goes_on(run, step=NEXT)
    require(not saved(run, BEFORE).exists(), "the half-deleted checkpoint is still there")
    return f"a half-deleted checkpoint passed over, went on from step {NEXT}"


def _stop(ground: Ground, number: signal.Signals) -> str:
    run, stopped_after = ground.run(), _ROW + 1
    ended = ground.resume(run, arm=partial(signal_at_row, _ROW, number), code=128 + number)
    require_said(ended, f"stopped by {number.name} after step {stopped_after} of", "solollm resume")
    require_intact(run, BEFORE, SAVED, stopped_after)
    ground.goes_on(run, step=stopped_after)
    proven = the_only(events(run, "continuation_proven"), "event continuation_proven")
    require(proven["result"] == "equal to the bit", f"what came next is {proven['result']}")
    return f"exit code {128 + number}, saved step {stopped_after}, no step was lost"


def _stop_twice(ground: Ground) -> str:
    run, number = ground.run(), signal.SIGTERM
    begun = time.monotonic()
    again = partial(signal_again_in_the_save, _ROW, number)
    ground.resume(run, arm=again, code=128 + number)
    seconds = time.monotonic() - begun
    require(len(half_saved(run)) == 1, "it did not end in the save")
    require_intact(run, BEFORE, SAVED)
    ground.goes_on(run)
    return f"exit code {128 + number} in the middle of a save, after {seconds:.1f} s in all"


def _hang_up(ground: Ground) -> str:
    run = ground.run()
    ground.resume(run, arm=partial(signal_at_row, _ROW, signal.SIGHUP))
    ground.same_end(run)
    return "went on to the end"


def _suspend(ground: Ground) -> str:
    run = ground.run()
    with ground.life("resume", str(run), "--unsupervised", arm=partial(hold_at_row, _ROW)) as life:
        life.wait_until(life.mark.exists, f"step {_ROW}")
        os.kill(life.pid, signal.SIGSTOP)
        process = psutil.Process(life.pid)
        life.wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "a stop")
        life.release()
        time.sleep(_SUSPENDED_SECONDS)
        size = (run / "metrics.jsonl").stat().st_size
        require(process.status() == psutil.STATUS_STOPPED, "it did not stand still")
        os.kill(life.pid, signal.SIGCONT)
        ended = life.end()
    require(ended.code == 0, f"it ended with {ended.code}: {ended.shown}")
    require((run / "metrics.jsonl").stat().st_size > size, "it had ended before it was suspended")
    ground.same_end(run)
    return f"stood still for {_SUSPENDED_SECONDS} s, went on to the end"


def _killed_in_save(ground: Ground, call: Call, pattern: str) -> Path:
    """The half of a save that a killed life of a fresh run has left."""
    run = ground.run()
    ground.resume(run, arm=partial(kill_in_call, call, pattern), code=-signal.SIGKILL)
    require_intact(run, BEFORE, SAVED)
    return run / "checkpoints" / the_only(half_saved(run), "half save")


_KILLED = "the steps since the last checkpoint are done again, and no more"
_STOPPED = "it saves first and ends with {}; no step is lost"
FAULTS = (
    Fault("kill-in-a-step", "SIGKILL while a step is computed", _KILLED, _kill_in_a_step),
    Fault(
        "kill-in-a-save", "SIGKILL with half of the weights written", _KILLED, _kill_in_a_save
    ),
    Fault(
        "kill-in-the-manifest", "SIGKILL with half of the manifest written", _KILLED,
        _kill_in_the_manifest,
    ),
    Fault(
        "kill-before-the-name", "SIGKILL before a finished save gets its name", _KILLED,
        _kill_before_the_name,
    ),
    Fault(
        "kill-in-the-pruning", "SIGKILL while an old checkpoint is deleted",
        "the half-deleted one is never taken for whole", _kill_in_the_pruning,
    ),
    Fault(
        "sigterm", "SIGTERM between two saves", _STOPPED.format(143),
        partial(_stop, number=signal.SIGTERM),
    ),
    Fault(
        "sigint", "SIGINT (Ctrl-C) between two saves", _STOPPED.format(130),
        partial(_stop, number=signal.SIGINT),
    ),
    Fault(
        "second-signal", "a second SIGTERM in the save that the first one asked for",
        "it ends at once, with 143; what was saved before is whole", _stop_twice,
    ),
    Fault("hang-up", "SIGHUP: its terminal is closed", "the run goes on", _hang_up),
    Fault(
        "suspended", "SIGSTOP, later SIGCONT, as a laptop that sleeps", "the run goes on", _suspend
    ),
)  # fmt: skip
