"""Energy used by the machine while something runs, where the machine tells.

Linux tells it of the processor packages through RAPL (often to root only), `nvidia-smi` of the
cards as watts now and then. Everything else (memory, fans, the power supply) is in neither, and
macOS tells only root: then the answer is why there is none, never an estimate.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType

from solollm.hardware import HostSystem, System

_RAPL = "/sys/class/powercap/intel-rapl:{package}"
_MAX_PACKAGES = 8
_SMI = ("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits")
_SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Energy:
    """`joules` used, by `source`; None where nothing tells, and `reason` says why."""

    joules: float | None
    source: str
    reason: str = ""


class EnergyMeter:
    """`with EnergyMeter() as meter: ...`, then `meter.result`."""

    def __init__(self, system: System | None = None) -> None:
        self._system = system or HostSystem()
        self._cards = _Watts(self._system)
        self._before: dict[int, int] = {}
        self.result = Energy(None, "", "not measured yet")

    def __enter__(self) -> EnergyMeter:
        self._before = self._counters()
        self._cards.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        cards = self._cards.stop()
        after = self._counters()
        packages = [
            self._difference(package, start, after[package])
            for package, start in self._before.items()
            if package in after
        ]
        parts, joules = [], 0.0
        if packages:
            parts.append("processor packages (RAPL)")
            joules += sum(packages) / 1e6
        if cards is not None:
            parts.append("graphics cards (nvidia-smi)")
            joules += cards
        reason = "neither RAPL counters nor nvidia-smi can be read here"
        self.result = Energy(joules, " and ".join(parts)) if parts else Energy(None, "", reason)

    def _counters(self) -> dict[int, int]:
        """Microjoules of each package, as far as they can be read."""
        found = {}
        for package in range(_MAX_PACKAGES):
            text = self._system.read(f"{_RAPL.format(package=package)}/energy_uj").strip()
            if text.isdigit():
                found[package] = int(text)
        return found

    def _difference(self, package: int, before: int, after: int) -> int:
        """Microjoules; the counter starts anew at its maximum."""
        if after >= before:
            return after - before
        text = self._system.read(f"{_RAPL.format(package=package)}/max_energy_range_uj").strip()
        return after - before + (int(text) if text.isdigit() else 0)


class _Watts:
    """The cards' power, sampled on a thread and integrated over time."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._readings: list[tuple[float, float]] = []  # (monotonic seconds, watts)

    def start(self) -> None:
        self._read()
        if self._readings:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def stop(self) -> float | None:
        """Joules since `start`; None without cards."""
        if self._thread is None:
            return None
        self._stop.set()
        self._thread.join()
        self._read()
        pairs = zip(self._readings, self._readings[1:], strict=False)
        return sum((b - a) * (first + second) / 2 for (a, first), (b, second) in pairs)

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._read()

    def _read(self) -> None:
        now = time.monotonic()
        watts = []
        for line in self._system.run(_SMI).splitlines():
            try:
                watts.append(float(line.strip()))
            except ValueError:  # "[N/A]"
                continue
        if watts:
            self._readings.append((now, sum(watts)))
