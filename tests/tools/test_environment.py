"""The set-up from nothing: what it does, and what it says where something is missing."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

_PATH = Path(__file__).resolve().parents[2] / "tools" / "environment.py"
_Usage = namedtuple("_Usage", "total used free")


class _Pip:
    """Stands in for every child process: records commands, fails where told to."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.refused = ""

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        failed = bool(self.refused) and any(self.refused in word for word in command)
        return subprocess.CompletedProcess(command, int(failed), "", "no such version")

    def installed(self) -> list[str]:
        return [word for command in self.commands if "pip" in command for word in command[4:]]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/environment.py on a Linux machine without a driver and with a large disk."""
    spec = importlib.util.spec_from_file_location("tools_environment", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(1e12, 0, 1e12))
    return module


@pytest.fixture
def pip(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> _Pip:
    fake = _Pip()
    monkeypatch.setattr(subprocess, "run", fake.run)
    return fake


def test_cpu_build_is_asked_for_where_no_driver_is_seen(
    environment: ModuleType, pip: _Pip, tmp_path: Path
) -> None:
    """Three gigabytes of CUDA libraries on a laptop; torch drawn in by the project before it."""
    environment.ensure_environment(tmp_path / "venv", ["pytest"], extra_disk=0)
    words = pip.installed()
    cpu = f"torch=={environment.TORCH}+cpu"
    assert words.index(cpu) < words.index("--editable") < words.index("pytest")


def test_driver_gets_the_ordinary_build(
    environment: ModuleType, pip: _Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card left idle because its owner got the CPU build."""
    monkeypatch.setattr(environment, "has_nvidia_driver", lambda: True)
    environment.ensure_environment(tmp_path / "venv", [], extra_disk=0)
    assert f"torch=={environment.TORCH}" in pip.installed()
    assert f"torch=={environment.TORCH}+cpu" not in pip.installed()


def test_no_cpu_build_anywhere_falls_back_and_says_so(
    environment: ModuleType, pip: _Pip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stop where the large build would have run; a silent download of gigabytes."""
    pip.refused = "+cpu"
    environment.ensure_environment(tmp_path / "venv", [], extra_disk=0)
    assert f"torch=={environment.TORCH}" in pip.installed()
    assert "--torch-index URL" in capsys.readouterr().out


def test_a_second_run_does_nothing_until_the_project_changes(
    environment: ModuleType, pip: _Pip, tmp_path: Path
) -> None:
    """Minutes of pip at every check, or an environment that never follows pyproject.toml."""
    folder = tmp_path / "venv"
    environment.ensure_environment(folder, ["pytest"], extra_disk=0)
    count = len(pip.commands)
    environment.ensure_environment(folder, ["pytest"], extra_disk=0)
    assert len(pip.commands) == count
    environment.ensure_environment(folder, ["pytest", "ruff"], extra_disk=0)
    assert len(pip.commands) > count


def test_an_install_that_failed_is_not_taken_for_a_good_one(
    environment: ModuleType, pip: _Pip, tmp_path: Path
) -> None:
    """The stamp written before the work is done."""
    pip.refused = "--editable"
    for _ in range(2):
        with pytest.raises(environment.SetupError, match="pip could not install SoloLLM"):
            environment.ensure_environment(tmp_path / "venv", [], extra_disk=0)


@pytest.mark.parametrize(
    ("platform", "words"), [("win32", "WSL2"), ("linux", "python3"), ("darwin", "python3")]
)
def test_a_missing_venv_module_names_the_package(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str,
    words: str,
) -> None:  # fmt: skip
    """Debian's Python without ensurepip ending in somebody else's traceback."""
    monkeypatch.setattr(environment.sys, "platform", platform)
    monkeypatch.setattr(environment.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(environment.SetupError, match=words):
        environment.ensure_environment(tmp_path / "venv", [], extra_disk=0)


def test_a_full_disk_is_said_before_anything_is_downloaded(
    environment: ModuleType, pip: _Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip failing after ten minutes with `No space left on device`."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(1e12, 0, 0.5e9))
    with pytest.raises(environment.SetupError, match=r"0\.5 GB free"):
        environment.ensure_environment(tmp_path / "venv", [], extra_disk=0)
    assert pip.commands == []


def test_an_old_python_is_told_what_is_needed(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A syntax error instead of a sentence."""
    monkeypatch.setattr(environment.sys, "version_info", (3, 9, 18))
    with pytest.raises(environment.SetupError, match=r"needs 3\.11"):
        environment.ensure_environment(tmp_path / "venv", [], extra_disk=0)


def test_the_scripts_parse_on_older_pythons() -> None:
    """A new spelling in the bootstrap files: the old Python never reaches the sentence above."""
    import ast

    for name in ("environment", "check", "quickstart"):
        source = (_PATH.parent / f"{name}.py").read_text(encoding="utf-8")
        ast.parse(source, feature_version=(3, 7))


def test_the_named_torch_is_within_the_projects_range() -> None:
    """The tested version and the metadata drifting apart."""
    import tomllib

    source = _PATH.read_text(encoding="utf-8")
    project = tomllib.loads((_PATH.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    (wanted,) = [r for r in project["project"]["dependencies"] if "linux" in r]
    low, high = wanted.split(";")[0].removeprefix("torch>=").split(",<")
    named = source.split('TORCH = "')[1].split('"')[0]
    parts = [tuple(int(part) for part in text.split(".")) for text in (low, named, high)]
    assert parts[0] <= parts[1] < parts[2]
    assert sys.version_info >= (3, 11)
