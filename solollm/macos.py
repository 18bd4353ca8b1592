"""`Host` on a Mac, from the commands that every macOS has; none needs `sudo`.

    sysctl -n kern.memorystatus_vm_pressure_level    1 normal, 2 warning, 4 critical
    notifyutil -g com.apple.system.thermalpressurelevel
                        0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping; finer than
                        NSProcessInfo.thermalState, which calls both 1 and 2 "fair"
    pmset -g therm      CPU_Speed_Limit, in percent: where the first one says nothing
    pmset -g batt       the source of power, and the charge
    pmset -g            lowpowermode (powermode 1 on Macs with three modes)
    caffeinate          keeps the Mac awake: -i always, -s on mains power, -w as long as a process

The GPU's share of the memory is `hardware.Gpu.memory_bytes`; raising it is the owner's decision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from solollm.hardware import HostSystem, System
from solollm.vitals import Heat, Host, Pressure, Vitals, command_line

_PRESSURE = ["sysctl", "-n", "kern.memorystatus_vm_pressure_level"]
_THERMAL_LEVEL = ["notifyutil", "-g", "com.apple.system.thermalpressurelevel"]
_PRESSURES: dict[str, Pressure] = {"2": "warning", "4": "critical"}
_HEATS: tuple[Heat, ...] = ("nominal", "fair", "serious", "critical")
# `CPU_Speed_Limit` in percent, and what a Mac that is held at or below it is.
_SPEED_LIMITS: tuple[tuple[int, Heat], ...] = ((50, "critical"), (80, "serious"), (99, "fair"))


class MacHost(Host):
    """This Mac."""

    def __init__(self, system: System | None = None) -> None:
        self._system = system or HostSystem()

    def vitals(self) -> Vitals:
        run = self._system.run
        percent, on_battery = battery(run(["pmset", "-g", "batt"]))
        return Vitals(
            pressure=_PRESSURES.get(run(_PRESSURE).strip(), "normal"),
            heat=self._heat(),
            on_battery=on_battery,
            battery_percent=percent,
            low_power_mode=low_power_mode(run(["pmset", "-g"])),
        )

    def oom_kills(self) -> int:
        return 0  # the system kills for memory (jetsam) but counts it nowhere that we may read

    def awake_command(self, pid: int) -> Sequence[str]:
        return command_line(self._system, "caffeinate", "-i", "-s", "-w", str(pid))

    def _heat(self) -> Heat:
        level = thermal_level(self._system.run(_THERMAL_LEVEL))
        if level is not None:
            return _HEATS[min(level, 3)]
        return speed_limit_heat(self._system.run(["pmset", "-g", "therm"]))


def battery(text: str) -> tuple[int | None, bool]:
    """(percent of charge, None without a battery; whether it is what the Mac runs on), of
    `pmset -g batt`. An uninterruptible power supply counts as mains until it discharges."""
    charge = re.search(r"^\s*-.*?(\d+)%;", text, re.MULTILINE)
    on_battery = "drawing from 'Battery Power'" in text or "drawing from 'UPS Power'" in text
    return (int(charge.group(1)) if charge else None), on_battery


def low_power_mode(text: str) -> bool:
    """Whether `pmset -g` says that Low Power Mode is on."""
    return re.search(r"^\s*(?:lowpowermode|powermode)\s+1\b", text, re.MULTILINE) is not None


def thermal_level(text: str) -> int | None:
    """The number of `notifyutil -g`; None where it answers otherwise (`Failed with code ...`)."""
    found = re.match(r"com\.apple\.system\.thermalpressurelevel (\d+)\s*$", text)
    return int(found.group(1)) if found else None


def speed_limit_heat(text: str) -> Heat:
    """What `pmset -g therm` means; it says nothing but notes on a Mac that was never hot."""
    found = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text)
    percent = int(found.group(1)) if found else 100
    return next((heat for limit, heat in _SPEED_LIMITS if percent <= limit), "nominal")
