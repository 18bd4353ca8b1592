"""The wheel: what is in it, and that it runs from another folder in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project built as a wheel, with this environment's hatchling and no network."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a fresh environment that holds the wheel. Its dependencies are this
    environment's, joined by a path file, which (unlike an editable install) runs no code."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def _run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    """A backend left out, tests shipped along, or the licence missing."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    packages = {name for name in tops if not name.endswith(".dist-info")}
    assert packages >= {"solollm", "solollm_torch"}
    assert packages <= {"solollm", "solollm_torch", "solollm_mlx"}
    for wanted in ("solollm/py.typed", "solollm_torch/py.typed", "solollm/testing/__init__.py"):
        assert wanted in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_command_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """Code that finds its files, or its own package, only because the checkout is the current
    folder."""
    shown = _run([installed / "solollm", "--help"], tmp_path)
    assert "quickstart" in shown.stdout
    where = _run([installed / "python", "-c", "import solollm; print(solollm.__file__)"], tmp_path)
    assert where.stdout.startswith(str(installed.parent))


def test_the_installed_backends_are_found(installed: Path, tmp_path: Path) -> None:
    """An entry point that is written down but not packaged."""
    script = "from solollm.registry import find_backends\nprint([c for c in find_backends()])"
    shown = _run([installed / "python", "-c", script], tmp_path)
    assert "name='torch'" in shown.stdout
    assert "does not load" not in shown.stdout
