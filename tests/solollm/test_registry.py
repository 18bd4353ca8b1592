"""Choosing a backend: order, reasons, and errors that say what to run."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from solollm import registry
from solollm.backend import Backend, Capabilities, MemoryCosts, Probe
from solollm.errors import BackendError, ConfigError
from solollm.hardware import Gpu, Machine


class _Fast(Backend):
    """A backend that can be selected and nothing else."""

    name = "fast"
    answer = Probe(True, "", "gpu", 50)

    @classmethod
    def probe(cls) -> Probe:
        return cls.answer

    def capabilities(self) -> Capabilities:
        raise NotImplementedError

    def memory_costs(self, *_: Any) -> MemoryCosts:
        raise NotImplementedError

    def train_session(self, *_: Any) -> Any:
        raise NotImplementedError

    def engine(self, *_: Any) -> Any:
        raise NotImplementedError


class _Slow(_Fast):
    name = "slow"
    answer = Probe(True, "", "cpu", 10)


class _Absent(_Fast):
    name = "absent"
    answer = Probe(False, "its framework is not installed", "", 90)


_POINTS = {"slow": _Slow, "fast": _Fast, "absent": _Absent, "broken": None}


class _Point(EntryPoint):
    def load(self) -> Any:
        found = _POINTS[self.name]
        if found is None:
            raise ImportError("no module named gone")
        return found


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the installed backends; a test may change the list."""
    names = ["broken", "slow", "absent", "fast"]
    monkeypatch.delenv("SOLOLLM_BACKEND", raising=False)
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group: [_Point(name, "x:y", group) for name in names],
    )
    return names


def test_auto_takes_the_highest_priority_that_can_run() -> None:
    """An unavailable backend with a high priority, or a broken package, winning or raising."""
    selected = registry.select_backend()
    assert isinstance(selected.backend, _Fast)
    assert selected.reason == "`fast` on gpu: preferred over slow"


def test_environment_variable_beats_priority_and_an_argument_beats_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order argument > variable > priority."""
    monkeypatch.setenv("SOLOLLM_BACKEND", "slow")
    by_variable = registry.select_backend()
    assert isinstance(by_variable.backend, _Slow)
    assert "SOLOLLM_BACKEND is set" in by_variable.reason
    assert registry.select_backend("fast").backend.name == "fast"


def test_unknown_name_lists_what_is_installed_and_the_nearest() -> None:
    """`--backend fats` answered without a hint."""
    with pytest.raises(ConfigError) as caught:
        registry.select_backend("fats")
    assert "did you mean `fast`?" in caught.value.fix
    assert "slow" in caught.value.why


@pytest.mark.parametrize(
    ("name", "reason"), [("absent", "its framework is not installed"), ("broken", "gone")]
)
def test_backend_that_cannot_run_says_why(name: str, reason: str) -> None:
    """An explicit wish silently replaced by another backend."""
    with pytest.raises(BackendError, match=reason):
        registry.select_backend(name)


def test_no_backend_at_all_names_the_command(installed: list[str]) -> None:
    """'no backend' without what to run, or without each one's reason."""
    installed[:] = ["absent", "broken"]
    with pytest.raises(BackendError, match="absent: its framework is not installed") as caught:
        registry.select_backend()
    assert "pip install" in caught.value.fix
    installed[:] = []
    with pytest.raises(BackendError, match="no backend package is installed"):
        registry.select_backend()


def test_intel_mac_is_told_that_none_exists() -> None:
    """An Intel Mac's owner sent to a pip line that cannot work."""
    intel = Machine("macOS 13.6", "x86_64", "Intel", 4, 8, 1, 1)
    assert "Intel Mac" in registry.missing_backend_fix(intel)
    assert "pip" not in registry.missing_backend_fix(intel)
    chip = Gpu("Apple M3 GPU", "apple", 1, 1)
    silicon = Machine("macOS 15", "arm64", "Apple M3", 8, 8, 1, 1, (chip,))
    assert "pip install 'solollm[mlx]'" in registry.missing_backend_fix(silicon)
    translated = Machine("macOS 15", "x86_64", "Apple M2", 8, 8, 1, 1, is_translated=True)
    assert "arm64 Python" in registry.missing_backend_fix(translated)
