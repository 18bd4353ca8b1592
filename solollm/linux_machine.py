"""`Host` on Linux, from /proc and /sys.

/proc/pressure/memory               stall time of the last ten seconds (PSI, kernel 4.20+)
/proc/vmstat                        oom_kill: processes killed for memory
/sys/class/power_supply             batteries (type, capacity, status) and mains (online)
/sys/firmware/acpi/platform_profile low-power, balanced, performance
/sys/class/thermal                  zones with their trip points, in thousandths of a degree
systemd-inhibit                     keeps the machine awake while its command runs; that one
                                    ends when our end of its standard input closes
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

from solollm.hardware import HostSystem, System
from solollm.vitals import Heat, Host, Pressure, Vitals, command_line

# Shares of the last ten seconds in which some, or all, tasks waited for memory.
_SOME_WARNING, _FULL_CRITICAL = 10.0, 20.0
_BATTERIES = ("BAT0", "BAT1", "BATT", "macsmc-battery")
_MAX_ZONES = 32
_MARGIN = 5_000  # thousandths of a degree below the point at which the machine is turned off
_POWER_OFF_KINDS = {"critical", "hot"}


class LinuxHost(Host):
    """This Linux machine."""

    def __init__(self, system: System | None = None) -> None:
        self._system = system or HostSystem()

    def vitals(self) -> Vitals:
        percent, on_battery = self._battery()
        profile = self._system.read("/sys/firmware/acpi/platform_profile").strip()
        return Vitals(
            pressure=pressure(self._system.read("/proc/pressure/memory")),
            heat=self._heat(),
            on_battery=on_battery,
            battery_percent=percent,
            low_power_mode=profile == "low-power",
        )

    def oom_kills(self) -> int:
        found = re.search(r"^oom_kill (\d+)$", self._system.read("/proc/vmstat"), re.MULTILINE)
        return int(found.group(1)) if found else 0

    def awake_command(self, pid: int) -> Sequence[str]:
        return command_line(
            self._system, "systemd-inhibit", "--what=idle:sleep", "--who=SoloLLM",
            "--why=a training run", "--mode=block", "cat",
        )  # fmt: skip

    def _battery(self) -> tuple[int | None, bool]:
        """(percent of the machine's own batteries, whether it runs on them)."""
        charges, discharging = [], False
        for folder in (f"/sys/class/power_supply/{name}" for name in _BATTERIES):
            capacity = self._system.read(f"{folder}/capacity").strip()
            if not capacity.isdigit():
                continue
            charges.append(int(capacity))
            discharging |= self._system.read(f"{folder}/status").strip() == "Discharging"
        return (sum(charges) // len(charges) if charges else None), discharging

    def _heat(self) -> Heat:
        """The worst zone: where the kernel slows the processor down it is serious, near the point
        where it turns the machine off critical."""
        heats: list[Heat] = ["nominal"]
        folders = (f"/sys/class/thermal/thermal_zone{n}" for n in range(_MAX_ZONES))
        for folder in takewhile(lambda f: self._system.read(f"{f}/type"), folders):
            heats.append(self._zone_heat(folder))
        return max(heats, key=("nominal", "fair", "serious", "critical").index)

    def _zone_heat(self, folder: str) -> Heat:
        now = _number(self._system.read(f"{folder}/temp"))
        if now is None:
            return "nominal"
        found: Heat = "nominal"
        for trip in range(8):
            kind = self._system.read(f"{folder}/trip_point_{trip}_type").strip()
            point = _number(self._system.read(f"{folder}/trip_point_{trip}_temp"))
            if not kind:
                break
            if point is None or point <= 0:
                continue
            if kind in _POWER_OFF_KINDS and now >= point - _MARGIN:
                return "critical"
            if kind == "passive" and now >= point:
                found = "serious"
        return found


def pressure(text: str) -> Pressure:
    """What `/proc/pressure/memory` means."""
    averages = dict(re.findall(r"^(some|full) avg10=([\d.]+)", text, re.MULTILINE))
    if float(averages.get("full", 0)) >= _FULL_CRITICAL:
        return "critical"
    return "warning" if float(averages.get("some", 0)) >= _SOME_WARNING else "normal"


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.lstrip("-").isdigit() else None
