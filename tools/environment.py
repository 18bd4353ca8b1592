"""A private Python environment with this project in it, made with the standard library only.

Used by `tools/quickstart.py` and `tools/check.py`. Re-runnable: an environment whose stamp equals
the digest of what it was made from is taken as it is. What is missing on the machine (a Python new
enough, the `venv` module, disk space, the network) is named together with what to do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 11)
TORCH = "2.13.0"  # the exact version that the tests ran with; pyproject.toml has the range

# Measured on Linux x86-64; shown to the user, and checked against the free disk.
CPU_TORCH_DOWNLOAD, CPU_TORCH_DISK = "200 MB", 1.0e9
CUDA_TORCH_DOWNLOAD, CUDA_TORCH_DISK = "3 GB", 7.0e9
_STAMP = "solollm-environment"
_SIGN_OF_LIFE_SECONDS = 30.0


class SetupError(Exception):
    """Set-up cannot go on; the text says what is missing and what to do."""


def say(text: str) -> None:
    print(text, flush=True)


def has_nvidia_driver() -> bool:
    """Whether `nvidia-smi` lists a card."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def python_of(folder: Path) -> Path:
    """The environment's interpreter."""
    return folder / "bin" / "python"


def ensure_environment(
    folder: Path, requirements: list[str], *, extra_disk: float, torch_index: str = ""
) -> Path:
    """The interpreter of an environment at `folder` that holds torch, `requirements` and this
    project, editable. Makes it, or brings it up to date, if its stamp differs.

    Args:
        extra_disk: bytes that `requirements` take, for the check of free space.
        torch_index: a package index to take torch from, instead of pip's configured ones.

    Raises:
        SetupError: something is missing; the message says what to do.
    """
    _check_machine(folder)
    cuda = has_nvidia_driver()
    stamp = folder / _STAMP
    digest = _digest(requirements, cuda)
    if stamp.is_file() and stamp.read_text() == digest and python_of(folder).exists():
        return python_of(folder)
    if not python_of(folder).exists():
        _check_disk(folder, (CUDA_TORCH_DISK if cuda else CPU_TORCH_DISK) + extra_disk)
        _make(folder)
    stamp.unlink(missing_ok=True)
    _install_torch(folder, cuda, torch_index)
    _pip(folder, ["--editable", str(ROOT), *requirements], "SoloLLM and what it needs")
    stamp.write_text(digest)
    return python_of(folder)


def require_python() -> None:
    """Raise SetupError on a Python too old for what follows."""
    if sys.version_info < MINIMUM_PYTHON:
        raise SetupError(
            f"this is Python {platform.python_version()}; SoloLLM needs 3.11 or newer.\n"
            "Install one (`apt install python3.11`, `brew install python`, python.org) and run"
            " this file with it."
        )


def _check_machine(folder: Path) -> None:
    require_python()
    if sys.platform == "win32":
        raise SetupError(
            "Windows is supported through WSL2: `wsl --install`, then run this inside Ubuntu."
        )
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        raise SetupError(
            "no current PyTorch or MLX exists for Intel Macs (or for an Intel Python on Apple"
            " silicon: install an arm64 Python there)."
        )
    missing = [n for n in ("venv", "ensurepip") if importlib.util.find_spec(n) is None]
    if missing and not python_of(folder).exists():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            f"this Python has no `{missing[0]}` module, so no private environment can be made.\n"
            f"On Debian and Ubuntu: `sudo apt install python{version}-venv`."
        )


def _check_disk(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise SetupError(
            f"the disk of {folder.parent} has {free / 1e9:.1f} GB free; the environment needs"
            f" about {needed / 1e9:.1f} GB. Free some space and run this again."
        )


def _make(folder: Path) -> None:
    say(f"Making a private Python environment in {folder.name}/ ...")
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise SetupError(
            f"`python -m venv` failed:\n{(made.stdout + made.stderr).strip()}\n"
            "On Debian and Ubuntu the package `python3-venv` is often what is missing."
        )


def _install_torch(folder: Path, cuda: bool, index: str) -> None:
    """PyTorch: the build for NVIDIA cards where there is a driver, else the CPU build.

    On Linux the CPU build carries the version suffix `+cpu`. It is asked for first; where pip's
    indexes do not have it, the ordinary build runs on a CPU too and is merely large.
    """
    source = ["--index-url", index] if index else []
    if cuda or sys.platform != "linux":
        size = CUDA_TORCH_DOWNLOAD if cuda else CPU_TORCH_DOWNLOAD
        _pip(folder, [*source, f"torch=={TORCH}"], f"PyTorch {TORCH}, about {size}")
        return
    what = f"PyTorch {TORCH} (no NVIDIA driver seen), about {CPU_TORCH_DOWNLOAD}"
    if _pip_succeeds(folder, [*source, f"torch=={TORCH}+cpu"], what):
        return
    say(
        "  pip's package indexes do not offer the CPU build. The build for NVIDIA cards runs on a"
        f" CPU too,\n  but is {CUDA_TORCH_DOWNLOAD}. To avoid it, stop with Ctrl-C and run again"
        " with --torch-index URL:\n  the index that PyTorch's own install page shows for Linux,"
        " Pip, CPU."
    )
    _check_disk(folder, CUDA_TORCH_DISK)
    _pip(folder, [*source, f"torch=={TORCH}"], f"PyTorch {TORCH}, about {CUDA_TORCH_DOWNLOAD}")


def _pip(folder: Path, arguments: list[str], what: str) -> None:
    done = _run_pip(folder, arguments, what)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise SetupError(
            f"pip could not install {what}:\n{tail}\n"
            "Check the network (and any proxy), then run this again: it goes on where it stopped."
        )


def _pip_succeeds(folder: Path, arguments: list[str], what: str) -> bool:
    return _run_pip(folder, arguments, what).returncode == 0


def _run_pip(folder: Path, arguments: list[str], what: str) -> subprocess.CompletedProcess[str]:
    """Run pip to its end, and say now and then that it is still at work."""
    say(f"Downloading and installing {what} ...")
    command = [str(python_of(folder)), "-m", "pip", "install", "--disable-pip-version-check"]
    begun, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(_SIGN_OF_LIFE_SECONDS):
            say(f"  still at it after {time.monotonic() - begun:.0f} s")

    threading.Thread(target=tell, daemon=True).start()
    try:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    finally:
        ended.set()


def _digest(requirements: list[str], cuda: bool) -> str:
    """Changes whenever the environment would be made differently, or this checkout has moved."""
    parts = [platform.python_version(), TORCH, str(cuda), str(ROOT), *requirements]
    content = (ROOT / "pyproject.toml").read_bytes() + "\0".join(parts).encode()
    return hashlib.sha256(content).hexdigest()
