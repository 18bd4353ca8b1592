"""A Linux machine's state, from the files of /proc and /sys."""

from __future__ import annotations

from solollm.hardware import ScriptedSystem
from solollm.linux_machine import LinuxHost, pressure
from solollm.vitals import Vitals

PSI = (
    "some avg10={} avg60=1.10 avg300=0.31 total=6720371\n"
    "full avg10={} avg60=0.90 avg300=0.25 total=5401232\n"
)
BATTERY, ZONE = "/sys/class/power_supply/BAT0", "/sys/class/thermal/thermal_zone{}"


def _linux(**files: str) -> LinuxHost:
    return LinuxHost(ScriptedSystem(files=files))


def _zone(number: int, temperature: int, **trips: int) -> dict[str, str]:
    folder = ZONE.format(number)
    files = {f"{folder}/type": "x86_pkg_temp\n", f"{folder}/temp": f"{temperature}\n"}
    for index, (kind, point) in enumerate(trips.items()):
        files[f"{folder}/trip_point_{index}_type"] = f"{kind}\n"
        files[f"{folder}/trip_point_{index}_temp"] = f"{point}\n"
    return files


def test_a_laptop_in_trouble_is_read_whole() -> None:
    """One of the values taken from the wrong file."""
    files = {
        "/proc/pressure/memory": PSI.format("12.50", "3.00"),
        f"{BATTERY}/capacity": "18\n",
        f"{BATTERY}/status": "Discharging\n",
        "/sys/firmware/acpi/platform_profile": "low-power\n",
        **_zone(0, 97_000, passive=95_000, critical=110_000),
    }
    assert _linux(**files).vitals() == Vitals("warning", "serious", True, 18, True)


def test_a_server_without_any_of_it_is_harmless() -> None:
    """A kernel without PSI, a machine without zones and batteries, stopping every run."""
    assert _linux().vitals() == Vitals()


def test_stall_times_become_levels() -> None:
    """A machine that only swaps a little is stopped, or one that does nothing else goes on."""
    assert pressure(PSI.format("0.00", "0.00")) == "normal"
    assert pressure(PSI.format("10.00", "0.00")) == "warning"
    assert pressure(PSI.format("60.00", "20.00")) == "critical"


def test_the_hottest_zone_counts_and_odd_trip_points_do_not() -> None:
    """A negative trip point taken for one that is passed; zones after the first unread."""
    cool = _zone(0, 50_000, critical=105_000, passive=-274_000)
    assert _linux(**cool).vitals().heat == "nominal"
    assert _linux(**cool, **_zone(1, 101_000, critical=105_000)).vitals().heat == "critical"
    assert _linux(**_zone(0, 99_000, active=60_000, critical=105_000)).vitals().heat == "nominal"


def test_a_charging_battery_is_no_battery_power() -> None:
    """Plugged in at 5%, and the run stops."""
    files = {f"{BATTERY}/capacity": "5\n", f"{BATTERY}/status": "Charging\n"}
    vitals = _linux(**files).vitals()
    assert (vitals.on_battery, vitals.battery_percent) == (False, 5)


def test_kills_for_memory_are_counted() -> None:
    """A trainer killed for memory restarted with the same micro-batch."""
    assert _linux(**{"/proc/vmstat": "nr_free_pages 1\noom_kill 3\n"}).oom_kills() == 3
    assert _linux().oom_kills() == 0


def test_this_machine_can_be_read() -> None:
    """The real files spelt otherwise than in the tests."""
    vitals = LinuxHost().vitals()
    assert vitals.pressure in ("normal", "warning", "critical")
    assert LinuxHost().oom_kills() >= 0
