"""How the quickstart is told, and how its stages start the commands that they show."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Protocol


class Narrator(Protocol):
    """Where the story is told."""

    def stage(self, title: str, why: str) -> None: ...
    def say(self, text: str) -> None: ...
    def command(self, arguments: Sequence[str], program: str = "solollm") -> None: ...
    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None: ...
    def text(self, prompt: str, continuation: str) -> None: ...


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """`solollm` with these words, in a process of its own on this terminal."""
    return subprocess.Popen([sys.executable, "-m", "solollm", *arguments])
