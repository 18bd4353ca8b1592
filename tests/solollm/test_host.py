"""Advice before a long training, and which host a machine gets."""

from __future__ import annotations

from solollm.hardware import Gpu, Machine, ScriptedSystem
from solollm.host import machine_advice, macos_version, this_host
from solollm.linux_machine import LinuxHost
from solollm.macos import MacHost
from solollm.vitals import Vitals

GIB = 1 << 30


def _mac(gpu_bytes: int = 48 * GIB, os: str = "macOS 15.1") -> Machine:
    gpu = Gpu("Apple M3 Max GPU", "apple", gpu_bytes, gpu_bytes)
    return Machine(os, "arm64", "Apple M3 Max", 12, 12, 64 * GIB, 40 * GIB, (gpu,), "clang++")


def test_each_system_has_its_host() -> None:
    """A Mac looked after by /proc."""
    assert isinstance(this_host(ScriptedSystem("Darwin")), MacHost)
    assert isinstance(this_host(ScriptedSystem("Linux")), LinuxHost)


def test_a_healthy_mac_gets_no_advice() -> None:
    """Advice that is always there is read by nobody."""
    assert machine_advice(_mac(), Vitals(battery_percent=100)) == []


def test_advice_says_what_to_do() -> None:
    """A finding without a remedy."""
    troubled = Vitals("warning", "critical", True, 30, True)
    advice = machine_advice(_mac(), troubled)
    for words in (
        "close other programs",
        "at 30%: plug in",
        "Low Power Mode: Never",
        "give it air",
    ):
        assert any(words in line for line in advice), words
    linux = Machine("Linux 6.1", "x86_64", "cpu", 4, 8, 16 * GIB, 8 * GIB)
    assert "powerprofilesctl" in machine_advice(linux, Vitals(low_power_mode=True))[0]


def test_a_mac_that_wires_too_much_is_told_the_command() -> None:
    """A wired limit that ends in a kernel panic taken for generosity."""
    (line,) = machine_advice(_mac(62 * GIB), Vitals())
    assert "97%" in line
    assert "sudo sysctl iogpu.wired_limit_mb=0" in line


def test_versions_of_macos_that_are_too_old_are_named() -> None:
    """MLX's wheels need macOS 14, its wired memory 15."""
    assert "update to macOS 14" in machine_advice(_mac(os="macOS 13.6"), Vitals())[0]
    assert "macOS 15" in machine_advice(_mac(os="macOS 14.5"), Vitals())[0]
    assert macos_version(_mac(os="macOS 26.2")) == 26
    assert macos_version(Machine("Linux 6.1", "x86_64", "cpu", 4, 8, 1, 1)) == 0
