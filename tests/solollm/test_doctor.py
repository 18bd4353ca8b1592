"""The diagnosis: what it says of this machine, and what it advises on others."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from solollm import doctor
from solollm.cli import main
from solollm.commands.doctor import show
from solollm.dial import PRESET_NAMES
from solollm.doctor import BackendState, Speed, examine, measure_speed
from solollm.errors import BackendError
from solollm.hardware import Gpu, Machine

READY = (BackendState("torch", True, "cpu", ""),)
PLENTY = 1 << 40


def _machine(os: str = "Linux 6", gpus: tuple[Gpu, ...] = (), compiler: str = "g++") -> Machine:
    return Machine(os, "x86_64", "cpu", 4, 8, 16 << 30, 8 << 30, gpus, compiler)


def test_the_page_fits_80_columns_and_names_every_preset(tmp_path: Path) -> None:
    """A table that wraps into porridge on an ordinary terminal."""
    console = Console(file=io.StringIO(), width=80)
    found = examine(tmp_path, probe_seconds=0)
    show(found, console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    text = "\n".join(lines)
    for words in ("Machine", "Backends", "Optional packages", "What to change", *PRESET_NAMES):
        assert words in text, words


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    """Named tuples printed as lists without their names."""
    assert main(["doctor", "--json", "--no-speed"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["ram_bytes"] > 0
    assert {"name", "version", "purpose", "install"} == set(found["packages"][0])
    assert found["speed"] is None


def test_no_backend_is_shown_with_its_remedy_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The doctor dying of the very illness it is there to name."""

    def no_backend() -> None:
        raise BackendError("no backend can run here", fix="run `pip install torch`")

    monkeypatch.setattr(doctor, "select_backend", no_backend)
    assert main(["doctor", "--no-speed"]) == 1
    assert "pip install torch" in capsys.readouterr().out


def test_missing_packages_come_with_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pip line whose version differs from the project's own."""
    monkeypatch.setattr(doctor, "_PURPOSES", {"zstandard": "a", "wandb": "b"})
    monkeypatch.setattr(doctor, "_optional_requirements", lambda: {"zstandard": "zstandard>=0.22"})

    def missing(name: str) -> str:
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    lines = [package.install for package in doctor._packages()]
    assert lines == ["pip install 'zstandard>=0.22'", "pip install 'wandb'"]


def test_our_own_extras_are_understood() -> None:
    """Metadata spelt in a way that the parser does not expect."""
    assert doctor._optional_requirements()["zstandard"] == "zstandard>=0.22"


def test_advice_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem told without what to do; a healthy machine told to change something."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(doctor, "version", lambda name: "2.13.0+cpu")
    card = (Gpu("RTX", "nvidia", 1, 1),)
    assert doctor._advice(_machine(), READY, PLENTY, "") == []
    assert "g++" in doctor._advice(_machine(compiler=""), READY, PLENTY, "")[0]
    mac = doctor._advice(_machine("macOS 15", compiler=""), READY, PLENTY, "")[0]
    assert "xcode-select --install" in mac
    assert "CPU build" in doctor._advice(_machine(gpus=card), READY, PLENTY, "")[0]
    assert "disk" in doctor._advice(_machine(), READY, 1 << 30, "")[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS=1" in doctor._advice(_machine(), READY, PLENTY, "")[0]


def test_speed_is_measured_in_a_child() -> None:
    """The probe's script broken, or its rate off by a factor of a thousand."""
    speed = measure_speed(0.05)
    assert isinstance(speed, Speed)
    assert 0.5 < speed.gflops < 1e6
    assert speed.device


def test_a_broken_probe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A framework that crashes on import taking the doctor down with it."""
    monkeypatch.setattr(doctor, "_SPEED_SCRIPT", "import os; os.abort()")
    assert measure_speed(0.05) is None
