"""How the machine is right now: memory pressure, heat, power; and how it is kept awake.

`Host` is the one interface; `macos.MacHost` and `linux_machine.LinuxHost` read the real systems
without privileges, `solollm.testing.hosts.ScriptedHost` plays them. What does not change (chip,
memory, cards) is `solollm.hardware`; who decides on these values is `solollm.watch`.
"""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from solollm.hardware import System

Pressure = Literal["normal", "warning", "critical"]
Heat = Literal["nominal", "fair", "serious", "critical"]
_REFUSAL_SECONDS = 0.3  # a program that may not keep the machine awake ends sooner than this


@dataclass(frozen=True)
class Vitals:
    """One look at the machine. What the system does not tell is at its harmless value."""

    pressure: Pressure = "normal"
    heat: Heat = "nominal"
    on_battery: bool = False
    battery_percent: int | None = None  # None: no battery
    low_power_mode: bool = False


class Host(ABC):
    """The operating system, as far as a long training has to look after it."""

    @abstractmethod
    def vitals(self) -> Vitals:
        """Takes tens of milliseconds; never raises."""

    @abstractmethod
    def oom_kills(self) -> int:
        """Processes that the system has killed for memory since it started; 0 where it is not
        counted."""

    @abstractmethod
    def awake_command(self, pid: int) -> Sequence[str]:
        """The command that keeps the machine awake until process `pid` ends or its own standard
        input closes; empty where there is none."""

    @contextmanager
    def keep_awake(self) -> Iterator[bool]:
        """Prevent sleep while this is open, and no longer than this process lives. Yields whether
        the system agreed."""
        command = self.awake_command(os.getpid())
        if not command:
            yield False
            return
        try:
            keeper = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError:
            yield False
            return
        try:
            yield _goes_on(keeper)
        finally:
            assert keeper.stdin is not None
            keeper.stdin.close()
            keeper.terminate()
            keeper.wait()


def command_line(system: System, program: str, *arguments: str) -> list[str]:
    """A command of an installed program; empty where it is missing."""
    path = system.which(program)
    return [path, *arguments] if path else []


def _goes_on(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_REFUSAL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False
