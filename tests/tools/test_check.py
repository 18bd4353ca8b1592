"""The second look of CI: chance is told from defects, and named."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

_TOOLS = Path(__file__).resolve().parents[2] / "tools"
_CHANCE = """
from pathlib import Path

import pytest

@pytest.mark.parametrize("number", range({count}))
def test_by_chance(number):
    seen = Path(__file__).with_name("seen" + str(number))
    first = not seen.exists()
    seen.touch()
    assert not first
"""
_ONE_BY_CHANCE, _THREE_BY_CHANCE = _CHANCE.format(count=1), _CHANCE.format(count=3)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """tools/check.py, whose one step is the tests of an otherwise empty project."""
    monkeypatch.syspath_prepend(str(_TOOLS))
    module = importlib.import_module("check")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly"]
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "_FAILED_LAST", tmp_path / ".pytest_cache/v/cache/lastfailed")
    monkeypatch.setattr(module, "_steps", lambda arguments, python: [("tests", command)])
    monkeypatch.setattr(sys, "argv", ["check.py", "--here", "--second-look"])
    return module


def test_a_test_that_fails_by_chance_is_named_and_stops_nothing(check, tmp_path, capfd) -> None:
    (tmp_path / "test_one.py").write_text(_ONE_BY_CHANCE, encoding="utf-8")
    assert check.main() == 0
    assert "FLAKY" in (out := capfd.readouterr().out)
    assert "test_one.py::test_by_chance" in out


def test_without_a_second_look_one_failure_is_a_failure(check, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["check.py", "--here"])
    (tmp_path / "test_one.py").write_text(_ONE_BY_CHANCE, encoding="utf-8")
    assert check.main() == 1


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("def test_defect():\n    assert False\n", "it fails again"),
        (_THREE_BY_CHANCE, "three are no chance"),
        ("import no_such_module\n", "nothing was collected"),
    ],
)
def test_a_defect_stays_a_failure(check, tmp_path, body: str, why: str) -> None:
    (tmp_path / "test_one.py").write_text(body, encoding="utf-8")
    assert check.main() == 1, why
