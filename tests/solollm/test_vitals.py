"""Keeping a machine awake: a real child process, of a program that a test has written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solollm.hardware import HostSystem
from solollm.linux_machine import LinuxHost
from solollm.macos import MacHost


def _program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def _ends(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_a_mac_is_awake_exactly_while_it_trains(programs: Path) -> None:
    """`caffeinate` started with the wrong process, or left behind."""
    _program(programs, "caffeinate", f'echo $$ "$@" > {programs}/seen; exec sleep 60')
    with MacHost(HostSystem()).keep_awake() as agreed:
        assert agreed
        pid, *arguments = (programs / "seen").read_text().split()
        assert arguments == ["-i", "-s", "-w", str(os.getpid())]
    assert _ends(int(pid))


def test_linux_asks_systemd_and_believes_its_refusal(programs: Path) -> None:
    """A container without systemd reported as kept awake."""
    _program(programs, "systemd-inhibit", "echo 'Access denied' >&2; exit 1")
    with LinuxHost(HostSystem()).keep_awake() as agreed:
        assert not agreed
    _program(programs, "systemd-inhibit", f'echo "$@" > {programs}/seen; exec cat')
    with LinuxHost(HostSystem()).keep_awake() as agreed:
        assert agreed
        assert (programs / "seen").read_text().startswith("--what=idle:sleep --who=SoloLLM")


def test_a_killed_trainer_lets_linux_sleep_again(programs: Path) -> None:
    """An inhibitor that outlives the run, so that the laptop never sleeps again."""
    _program(programs, "systemd-inhibit", f"echo $$ > {programs}/pid; exec cat")
    script = (
        "import time\nfrom solollm.linux_machine import LinuxHost\n"
        "with LinuxHost().keep_awake() as agreed:\n"
        "    print(agreed, flush=True)\n    time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "True\n"
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    assert _ends(int((programs / "pid").read_text()))
