"""Which `Host` this is, and what its owner should change before a long training."""

from __future__ import annotations

from solollm.hardware import HostSystem, Machine, System
from solollm.linux_machine import LinuxHost
from solollm.macos import MacHost
from solollm.vitals import Host, Vitals

_OLDEST_MACOS = 14  # of MLX's wheels
_WIRED_LIMIT_MACOS = 15  # from here MLX can keep its memory from being swapped
# Above this share of the memory the system has too little left, and Macs have panicked.
_MOST_FOR_GPU = 0.9


def this_host(system: System | None = None) -> Host:
    """The operating system that this process runs on."""
    system = system or HostSystem()
    return MacHost(system) if system.kernel == "Darwin" else LinuxHost(system)


def machine_advice(machine: Machine, vitals: Vitals) -> list[str]:
    """What to change, the weightiest first; each with how."""
    advice = []
    if vitals.pressure != "normal":
        advice.append(f"memory pressure is {vitals.pressure}: close other programs before training")
    if vitals.on_battery:
        charge = "" if vitals.battery_percent is None else f" at {vitals.battery_percent}%"
        advice.append(f"running on battery{charge}: plug in; a run stops at"
                      " machine.min_battery_percent")  # fmt: skip
    if vitals.low_power_mode:
        how = "powerprofilesctl set balanced"
        if _is_mac(machine):
            how = "System Settings > Battery > Low Power Mode: Never"
        advice.append(f"low-power mode slows training down: `{how}` turns it off")
    if vitals.heat in ("serious", "critical"):
        advice.append(f"heat is {vitals.heat}: give it air; runs pause between steps"
                      " (machine.heat)")  # fmt: skip
    if _is_mac(machine) and machine.gpus:
        advice += _mac_advice(machine)
    return advice


def _mac_advice(machine: Machine) -> list[str]:
    advice = []
    share = machine.gpus[0].memory_bytes / max(1, machine.ram_bytes)
    if share > _MOST_FOR_GPU:
        advice.append(
            f"iogpu.wired_limit_mb gives the GPU {share:.0%} of the memory, which has made Macs"
            " panic: `sudo sysctl iogpu.wired_limit_mb=0` restores the default"
        )
    version = macos_version(machine)
    if 0 < version < _OLDEST_MACOS:
        advice.append(f"{machine.os} is too old for MLX: update to macOS {_OLDEST_MACOS} or newer")
    elif 0 < version < _WIRED_LIMIT_MACOS:
        advice.append(f"macOS {_WIRED_LIMIT_MACOS} lets MLX keep a model from being swapped out")
    return advice


def macos_version(machine: Machine) -> int:
    """The first number of macOS's version; 0 on other systems."""
    number = machine.os.removeprefix("macOS ").split(".")[0]
    return int(number) if _is_mac(machine) and number.isdigit() else 0


def _is_mac(machine: Machine) -> bool:
    return machine.os.startswith("macOS")
