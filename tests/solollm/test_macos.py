"""A Mac's state, from texts that its commands print."""

from __future__ import annotations

import pytest

from solollm.hardware import ScriptedSystem
from solollm.macos import MacHost, battery, low_power_mode, speed_limit_heat, thermal_level
from solollm.vitals import Vitals

PRESSURE = "sysctl -n kern.memorystatus_vm_pressure_level"
THERMAL = "notifyutil -g com.apple.system.thermalpressurelevel"
ON_MAINS = (
    "Now drawing from 'AC Power'\n"
    " -InternalBattery-0 (id=22806627)\t83%; charging; 1:00 remaining present: true\n"
)
ON_BATTERY = (
    "Now drawing from 'Battery Power'\n"
    " -InternalBattery-0 (id=22806627)\t19%; discharging; (no estimate) present: true\n"
)
SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 displaysleep         10
 sleep                1 (sleep prevented by sharingd, powerd)
 lowpowermode         {}
 womp                 1
"""
NEVER_HOT = """Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
Note: No CPU power status has been recorded
"""
SLOWED_DOWN = """Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
2021-07-05 14:28:10 +0200 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 8
\tCPU_Speed_Limit \t= 62
"""


def _mac(**commands: str) -> MacHost:
    texts = {"pmset -g batt": ON_MAINS, "pmset -g": SETTINGS.format(0), **commands}
    return MacHost(ScriptedSystem("Darwin", "15.1", "arm64", commands=texts))


def test_a_mac_in_trouble_is_read_whole() -> None:
    """One of the five values taken from the wrong command, or not at all."""
    host = _mac(**{
        PRESSURE: "2\n", THERMAL: "com.apple.system.thermalpressurelevel 2\n",
        "pmset -g batt": ON_BATTERY, "pmset -g": SETTINGS.format(1),
    })  # fmt: skip
    assert host.vitals() == Vitals("warning", "serious", True, 19, True)
    calm = _mac(**{PRESSURE: "1\n", THERMAL: "com.apple.system.thermalpressurelevel 0\n"})
    assert calm.vitals() == Vitals(battery_percent=83)


def test_a_mac_that_tells_nothing_is_harmless() -> None:
    """A command that is missing stops every training on that Mac."""
    assert MacHost(ScriptedSystem("Darwin", "15.1", "arm64")).vitals() == Vitals()


@pytest.mark.parametrize(
    ("level", "pressure"), [("1", "normal"), ("2", "warning"), ("4", "critical")]
)
def test_pressure_levels_are_the_kernels(level: str, pressure: str) -> None:
    """The kernel counts 1, 2, 4, not 1, 2, 3."""
    assert _mac(**{PRESSURE: f"{level}\n"}).vitals().pressure == pressure


@pytest.mark.parametrize(
    ("level", "heat"),
    [("0", "nominal"), ("1", "fair"), ("2", "serious"), ("3", "critical"), ("4", "critical")],
)
def test_thermal_levels_keep_moderate_and_heavy_apart(level: str, heat: str) -> None:
    """NSProcessInfo calls both "fair", though a Mac at "heavy" is slowed down already."""
    text = f"com.apple.system.thermalpressurelevel {level}\n"
    assert _mac(**{THERMAL: text}).vitals().heat == heat


def test_without_a_thermal_level_the_speed_limit_counts() -> None:
    """`notifyutil` that fails is no cool Mac."""
    assert thermal_level("Failed with code 1\n") is None
    assert thermal_level("") is None
    assert speed_limit_heat(NEVER_HOT) == "nominal"
    assert _mac(**{"pmset -g therm": SLOWED_DOWN}).vitals().heat == "serious"
    assert speed_limit_heat("CPU_Speed_Limit = 100") == "nominal"
    assert speed_limit_heat("CPU_Speed_Limit = 90") == "fair"
    assert speed_limit_heat("CPU_Speed_Limit = 40") == "critical"


def test_batteries_and_their_absence() -> None:
    """A Mac mini taken for a laptop that is empty; one on a UPS for one on mains power."""
    assert battery("Now drawing from 'AC Power'\n") == (None, False)
    assert battery(ON_BATTERY) == (19, True)
    charged = " -InternalBattery-0 (id=1)\t100%; charged; 0:00 remaining present: true\n"
    assert battery("Now drawing from 'AC Power'\n" + charged) == (100, False)
    ups = (
        "Now drawing from 'UPS Power'\n -Back-UPS ES 700 (id=3)\t74%; discharging; 0:20 remaining\n"
    )
    assert battery(ups) == (74, True)


def test_low_power_mode_under_both_names() -> None:
    """Macs with three modes say `powermode`, where 2 is high power."""
    assert not low_power_mode(SETTINGS.format(0))
    assert low_power_mode(SETTINGS.format(1))
    assert low_power_mode(" powermode            1\n")
    assert not low_power_mode(" powermode            2\n")


def test_the_mac_is_kept_awake_as_long_as_the_trainer() -> None:
    """A Mac that sleeps on, or never again after the trainer was killed."""
    system = ScriptedSystem("Darwin", programs={"caffeinate": "/usr/bin/caffeinate"})
    expected = ["/usr/bin/caffeinate", "-i", "-s", "-w", "4711"]
    assert MacHost(system).awake_command(4711) == expected
    assert MacHost(ScriptedSystem("Darwin")).awake_command(1) == []
