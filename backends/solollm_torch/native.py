"""Compiling a source of this package at its first use, once per user and machine."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def version_of(compiler: str) -> bytes:
    """What it says of itself."""
    return subprocess.run(
        [compiler, "--version"], capture_output=True, check=False, timeout=10
    ).stdout


def built(command: Sequence[str], digest: str) -> Path:
    """The file that `command` (without `-o`) makes, in a folder that only this user can write to,
    under the name `digest`, which stands for all that decides its content.

    Raises:
        OSError, subprocess.SubprocessError: it could not be made.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "solollm" / "kernels"
    path = folder / f"{digest}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "made.so"
        subprocess.run([*command, "-o", str(made)], capture_output=True, check=True, timeout=120)
        made.replace(path)  # whole or absent, also where two processes build at once
    return path
