"""What a run does about heat, power and memory, on a scripted machine and a scripted clock."""

from __future__ import annotations

from typing import Any

import pytest

from solollm.config import MachineTable
from solollm.testing.hosts import ScriptedHost
from solollm.vitals import Vitals
from solollm.watch import Heed, Watch


class Steps:
    """A training whose steps take `seconds` of a clock that only they and pauses move."""

    def __init__(self, *script: Vitals, seconds: float = 1.0, **settings: Any) -> None:
        self.now, self.seconds = 0.0, seconds
        self.host = ScriptedHost(script)
        table = MachineTable(**{"check_seconds": 10.0, **settings})
        self.watch = Watch(self.host, table, clock=lambda: self.now, sleep=self._sleep)

    def step(self, count: int = 1) -> Heed:
        for _ in range(count):
            self.now += self.seconds
            heed = self.watch.after_step()
            self.watch.pause(heed.pause_seconds)
        return heed

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_healthy_machine_costs_nothing() -> None:
    """Pauses or events without a reason; a look after every step."""
    run = Steps(Vitals(battery_percent=80))
    assert run.step(30) == Heed()
    assert run.host.looks == 3


def test_a_hot_machine_is_given_pauses_and_gets_them_back() -> None:
    """A duty cycle that goes the wrong way, or stays after the heat is gone."""
    hot = [Vitals(heat="serious")] * 3
    run = Steps(*hot, Vitals())
    first = run.step(10)
    assert first.events == ({"kind": "heat", "level": "serious", "duty": 0.7},)
    assert first.pause_seconds == pytest.approx(1 / 0.7 - 1)
    pauses = [first.pause_seconds]
    while run.host.looks < 3:
        pauses.append(run.step().pause_seconds)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(1 / 0.7**3 - 1)
    for _ in range(60):
        last = run.step()
    assert last.pause_seconds == 0


def test_critical_heat_leaves_a_quarter_at_once_and_pauses_stay_short() -> None:
    """A machine at its limit slowed down over minutes; a signal kept waiting for minutes."""
    run = Steps(Vitals(heat="critical"))
    assert run.step(10).pause_seconds == pytest.approx(3.0)
    slow = Steps(Vitals(heat="critical"), seconds=60.0)
    assert slow.step().pause_seconds == 10.0


def test_with_warn_heat_is_only_told() -> None:
    """`machine.heat = warn` without effect."""
    run = Steps(Vitals(heat="critical"), heat="warn")
    heed = run.step(10)
    assert heed.pause_seconds == 0
    assert heed.events[0]["kind"] == "heat"


def test_pressure_lets_caches_go_then_stops() -> None:
    """A run stopped at the first warning, or one that goes on until it is killed."""
    run = Steps(Vitals("warning"), Vitals("critical"))
    warned = run.step(10)
    assert (warned.release_cache, warned.stop) == (True, "")
    assert warned.events == ({"kind": "memory_pressure", "level": "warning"},)
    assert run.step(10).stop == "memory_pressure"
    told = Steps(Vitals("critical"), pressure="warn")
    assert told.step(10).stop == ""


@pytest.mark.parametrize(
    ("vitals", "settings", "stop"),
    [
        (Vitals(on_battery=True, battery_percent=20), {}, ""),
        (Vitals(on_battery=True, battery_percent=19), {}, "battery"),
        (Vitals(on_battery=False, battery_percent=5), {}, ""),
        (Vitals(on_battery=True, battery_percent=5), {"min_battery_percent": 0}, ""),
        (Vitals(low_power_mode=True), {}, ""),
        (Vitals(low_power_mode=True), {"low_power": "stop"}, "low_power"),
        (Vitals("critical", on_battery=True), {"check_seconds": 0}, ""),
    ],
)
def test_power_stops_where_the_config_says(
    vitals: Vitals, settings: dict[str, Any], stop: str
) -> None:
    """A laptop run down to nothing; a run that stops while it charges."""
    assert Steps(vitals, **settings).step(10).stop == stop


def test_what_has_not_changed_is_told_once() -> None:
    """An event every thirty seconds for hours on battery."""
    run = Steps(Vitals(on_battery=True, battery_percent=90))
    assert [len(run.step(10).events) for _ in range(3)] == [1, 0, 0]
