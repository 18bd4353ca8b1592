"""Energy on machines that tell it, and on one that does not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from solollm.evaluation.energy import EnergyMeter
from solollm.hardware import ScriptedSystem

_PACKAGE = "/sys/class/powercap/intel-rapl:{}/energy_uj"
_RANGE = "/sys/class/powercap/intel-rapl:{}/max_energy_range_uj"
_SMI = "nvidia-smi --query-gpu=power.draw --format=csv,noheader,nounits"


class _Later:
    """A machine that turns into another when the measured work has been done."""

    def __init__(self, before: ScriptedSystem, after: ScriptedSystem) -> None:
        self.now, self._after = before, after

    def pass_time(self) -> None:
        self.now = self._after

    def __getattr__(self, name: str) -> object:
        return getattr(self.now, name)


def _counters(**microjoules: str) -> ScriptedSystem:
    files = {_PACKAGE.format(name[1:]): value for name, value in microjoules.items()}
    files |= {_RANGE.format(name[1:]): "1000000" for name in microjoules}
    return ScriptedSystem(files=files)


def test_packages_are_added_and_a_counter_that_starts_anew_counts_on() -> None:
    """A wrapped counter taken for negative energy; the second socket forgotten."""
    machine = _Later(_counters(p0="900000\n", p1="100000\n"), _counters(p0="200000", p1="600000"))
    with EnergyMeter(machine) as meter:  # type: ignore[arg-type]
        machine.pass_time()
    assert meter.result.joules == pytest.approx(0.3 + 0.5)
    assert meter.result.source == "processor packages (RAPL)"


def test_the_power_of_cards_is_integrated_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watts taken for joules; "[N/A]" of one card that spoils the sum."""
    # The module's own name for it: other threads of this process go by the real clock.
    clock = SimpleNamespace(monotonic=iter([10.0, 14.0]).__next__)
    monkeypatch.setattr("solollm.evaluation.energy.time", clock)
    monkeypatch.setattr("solollm.evaluation.energy._SAMPLE_SECONDS", 3600.0)
    machine = ScriptedSystem(commands={_SMI: "100.0\n[N/A]\n50.0\n"})
    with EnergyMeter(machine) as meter:
        pass
    assert meter.result.joules == pytest.approx(4.0 * 150.0)


def test_a_machine_that_does_not_tell_gives_a_reason() -> None:
    """An invented figure where counters are root's alone."""
    with EnergyMeter(replace(ScriptedSystem(), kernel="Darwin")) as meter:
        pass
    assert meter.result.joules is None
    assert "RAPL" in meter.result.reason
