"""The machine around a run: others that want it, its state, its clock, and the supervisor."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from datetime import datetime, timedelta
from functools import partial

import psutil

from solollm.fault_proof.arming import hold_at_row, hurry_restarts, play_machine
from solollm.fault_proof.ground import (
    BEFORE,
    SAVED,
    Fault,
    Ground,
    events,
    require,
    require_intact,
    require_said,
    the_only,
)
from solollm.fault_proof.lives import LONGEST_SECONDS, Life, PromiseBroken
from solollm.runs import summarize
from solollm.supervisor import MAX_RESTARTS
from solollm.vitals import Vitals

_ALWAYS = {"check_seconds": 1e-9}  # the machine is looked at after every step
_TRIES = 4  # to kill a trainer that may be quicker


def _two_at_once(ground: Ground) -> str:
    run = ground.run()
    words = ("resume", str(run), "--unsupervised")
    with ground.life(*words, arm=partial(hold_at_row, SAVED + 2)) as first:
        first.wait_until(first.mark.exists, "a step")
        ended = ground.resume(run, code=1)
        require_said(ended, "is in use", f"process {first.pid}")
        first.release()
        ended = first.end()
    require(ended.code == 0, f"the first one ended with {ended.code}: {ended.shown}")
    ground.same_end(run)
    return "exit code 1, with the process that has it; the first one went on to the end"


def _stopped_by(ground: Ground, cause: str, vitals: Vitals) -> str:
    run = ground.run(machine=_ALWAYS)
    looks = [Vitals(), Vitals(), Vitals(), vitals]
    ended = ground.resume(run, arm=partial(play_machine, looks), code=75)
    row = the_only(events(run, "stopped"), "event stopped")
    require(row["cause"] == cause, f"the events say {row}")
    require_said(ended, f"stopped for {cause.replace('_', ' ')}", "solollm resume")
    require_intact(run, BEFORE, SAVED, row["step"])
    ground.goes_on(run, step=row["step"])
    return f"exit code 75, saved step {row['step']}, no step was lost"


def _heat(ground: Ground) -> str:
    run = ground.run(machine=_ALWAYS)
    looks = [Vitals(), Vitals(heat="serious"), Vitals(heat="critical"), Vitals()]
    ground.resume(run, arm=partial(play_machine, looks))
    levels = [row["level"] for row in events(run, "heat")]
    require(levels == ["serious", "critical", "nominal"], f"the events say {levels}")
    ground.same_end(run)
    return "slowed down and said so, went on to the end"


def _clock_back(ground: Ground) -> str:
    run = ground.run()
    day = timedelta(days=1)
    for path in sorted(run.rglob("*")):
        when = path.stat().st_mtime + day.total_seconds()
        os.utime(path, (when, when))
    log = run / "events.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        row["time"] = (datetime.fromisoformat(row["time"]) + day).isoformat(timespec="seconds")
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ground.goes_on(run)
    require(summarize(run).state == "finished", f"it is listed as {summarize(run).state}")
    return f"files and events of tomorrow changed nothing; went on from step {SAVED}"


def _supervised_killed(ground: Ground) -> str:
    for _ in range(_TRIES):
        run = ground.run()
        with ground.life("resume", str(run), "--supervised") as life:
            life.wait_until(partial(events, run, "resumed"), "a trainer")
            hit = _kill_trainer(life, set())
            ended = life.end()
        require(ended.code == 0, f"it ended with {ended.code}: {ended.shown}")
        ground.same_end(run)
        restarts = [(row["cause"], row["ending"]) for row in events(run, "restarted")]
        if hit and restarts:
            require(restarts == [("killed", "SIGKILL")], f"the events say {restarts}")
            require_said(ended, "again from its last checkpoint")
            return "started again, and said so; went on to the end"
    raise PromiseBroken(f"the trainer was never killed in time, in {_TRIES} tries")


def _given_up(ground: Ground) -> str:
    run = ground.run()
    killed: set[int] = set()
    with ground.life("resume", str(run), "--supervised", arm=hurry_restarts) as life:
        while life.wait_until(partial(_fresh, life, killed), "a trainer"):
            _kill_trainer(life, killed)
        ended = life.end()
    require(ended.code == 1, f"it ended with {ended.code}, not 1: {ended.shown}")
    require_said(ended, f"has failed {MAX_RESTARTS + 1} times", "SIGKILL", "solollm resume")
    require(len(killed) == MAX_RESTARTS + 1, f"{len(killed)} trainers were killed")
    require(len(events(run, "given_up")) == 1, "the events do not say that it has given up")
    ground.goes_on(run)
    return (
        f"given up with exit code 1 after {len(killed)} lives; by hand, went on from step {SAVED}"
    )


def _supervisor_killed(ground: Ground) -> str:
    run = ground.run()
    with ground.life("resume", str(run), "--supervised") as life:
        life.wait_until(partial(events, run, "resumed"), "a trainer")
        orphans = life.children()
        os.kill(life.pid, signal.SIGKILL)
        ended = life.end()
        require(ended.code == -signal.SIGKILL, f"it ended with {ended.code}: {ended.shown}")
        for orphan in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.wait(LONGEST_SECONDS)
    require(bool(orphans), "there was no trainer left")
    ground.same_end(run)
    return "the trainer went on alone to the end"


def _kill_trainer(life: Life, killed: set[int]) -> bool:
    """SIGKILL to a supervisor's child that is not among `killed`, where it joins them."""
    for child in _fresh(life, killed):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
            killed.add(child.pid)
            return True
    return False


def _fresh(life: Life, killed: set[int]) -> list[psutil.Process]:
    return [child for child in life.children() if child.pid not in killed]


_SAVES_FIRST = "it saves first and ends with 75; no step is lost"
FAULTS = (
    Fault(
        "two-at-once", "a second process wants to go on with the run that one is training",
        "the second one is refused with exit code 1; the first one is undisturbed", _two_at_once,
    ),
    Fault(
        "memory-pressure", "the machine (a scripted one) is short of memory", _SAVES_FIRST,
        partial(_stopped_by, cause="memory_pressure", vitals=Vitals(pressure="critical")),
    ),
    Fault(
        "battery-low", "the machine (a scripted one) runs on a battery that is nearly empty",
        _SAVES_FIRST,
        partial(
            _stopped_by, cause="battery", vitals=Vitals(on_battery=True, battery_percent=5)
        ),
    ),
    Fault(
        "heat", "the machine (a scripted one) is hot", "it slows down, and the bits stay", _heat
    ),
    Fault(
        "clock-set-back", "the clock is set back by a day: files and events are of tomorrow",
        "the run goes on, and is listed as what it is", _clock_back,
    ),
    Fault(
        "supervised-killed", "SIGKILL to the trainer under --supervised",
        "it is started again by itself", _supervised_killed,
    ),
    Fault(
        "killed-for-ever", "SIGKILL to every trainer under --supervised (pauses shortened)",
        f"exit code 1 after {MAX_RESTARTS} restarts without a new checkpoint, with what to do",
        _given_up,
    ),
    Fault(
        "supervisor-killed", "SIGKILL to the supervisor", "the trainer goes on alone",
        _supervisor_killed,
    ),
)  # fmt: skip
