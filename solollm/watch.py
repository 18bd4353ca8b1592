"""What a training does about the machine it runs on, step by step.

The trainer calls `after_step`; every `machine.check_seconds` the host is looked at, and the answer
says what happened (as events), how long to pause, and whether to stop. Pausing is a duty cycle: of
a hot machine's time a share is left unused, which shrinks and grows with its heat.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from solollm.config import MachineTable
from solollm.run_log import Row
from solollm.vitals import Host, Vitals

StopCause = Literal["memory_pressure", "battery", "low_power"]
STOP_FIXES: Mapping[StopCause, str] = {
    "memory_pressure": "close other programs or give a smaller --micro-batch-size",
    "battery": "plug the machine in",
    "low_power": "turn low-power mode off",
}
_COOLING = 0.7  # of the time in use, per look at a hot machine; given back as slowly
_LEAST_DUTY = 0.25
_LONGEST_PAUSE_SECONDS = 10.0  # so that a signal is not kept waiting


class Heed(NamedTuple):
    """What to do after a step. `stop` is the cause, "" to go on."""

    events: tuple[Row, ...] = ()
    pause_seconds: float = 0.0
    release_cache: bool = False
    stop: StopCause | Literal[""] = ""


class Watch:
    """Looks after one training on `host` as `table` says."""

    def __init__(
        self, host: Host, table: MachineTable, *, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._host, self._table = host, table
        self._clock, self._sleep = clock, sleep
        self._seen = Vitals()
        self._duty = 1.0
        self._looked = self._stepped = clock()

    def after_step(self) -> Heed:
        """Called once per step; what is returned has not been done yet."""
        now = self._clock()
        step_seconds, self._stepped = now - self._stepped, now
        heed = Heed()
        if self._table.check_seconds > 0 and now - self._looked >= self._table.check_seconds:
            self._looked = now
            heed = self._look()
        pause = min(step_seconds * (1 / self._duty - 1), _LONGEST_PAUSE_SECONDS)
        return heed._replace(pause_seconds=pause)

    def pause(self, seconds: float) -> None:
        """Leave the machine alone for so long; no part of the next step's time."""
        self._sleep(seconds)
        self._stepped = self._clock()

    def _look(self) -> Heed:
        before, now = self._seen, self._host.vitals()
        self._seen = now
        self._duty = self._next_duty(now)
        return Heed(
            events=tuple(_changes(before, now, self._duty)),
            release_cache=now.pressure != "normal",
            stop=self._stop(now),
        )

    def _next_duty(self, now: Vitals) -> float:
        if self._table.heat != "throttle":
            return 1.0
        if now.heat == "critical":
            return _LEAST_DUTY
        if now.heat == "serious":
            return max(_LEAST_DUTY, self._duty * _COOLING)
        return min(1.0, self._duty / _COOLING)

    def _stop(self, now: Vitals) -> StopCause | Literal[""]:
        table = self._table
        if now.pressure == "critical" and table.pressure == "stop":
            return "memory_pressure"
        charge = now.battery_percent
        if now.on_battery and charge is not None and charge < table.min_battery_percent:
            return "battery"
        if now.low_power_mode and table.low_power == "stop":
            return "low_power"
        return ""


def _changes(before: Vitals, now: Vitals, duty: float) -> list[Row]:
    """One event for each value that is not as it was."""
    rows: list[Row] = []
    if now.pressure != before.pressure:
        rows.append({"kind": "memory_pressure", "level": now.pressure})
    if now.heat != before.heat:
        rows.append({"kind": "heat", "level": now.heat, "duty": round(duty, 2)})
    power = (now.on_battery, now.low_power_mode)
    if power != (before.on_battery, before.low_power_mode):
        rows.append({
            "kind": "power", "on_battery": now.on_battery, "percent": now.battery_percent,
            "low_power_mode": now.low_power_mode,
        })  # fmt: skip
    return rows
