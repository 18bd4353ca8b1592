"""This machine as data: processor, memory, graphics cards, disk, compiler.

`read_machine()` asks the operating system without privileges and never fails: what cannot be
learnt is empty or zero. Everything goes through `System`, the one edge to the operating system, so
that a test plays any machine with `ScriptedSystem`. Who decides with these facts: `planner.py`
(does it fit), `registry.py` (why no backend), `solollm doctor` (what to change).
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

_COMMAND_SECONDS = 5.0  # a hung driver tool must not hang us
_COMPILERS = ("g++", "clang++", "c++")
_NVIDIA_QUERY = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.free,driver_version,compute_cap",
    "--format=csv,noheader,nounits",
)


class Gpu(NamedTuple):
    """One graphics processor. Apple's shares the machine's memory: `memory_bytes` is the part of
    it that the system lets the GPU hold."""

    name: str
    vendor: str  # "nvidia" or "apple"
    memory_bytes: int
    free_bytes: int
    driver: str = ""
    compute_capability: str = ""


@dataclass(frozen=True)
class Machine:
    """What a plan and a diagnosis need to know. Bytes are what this process may use: limits of a
    container are already applied."""

    os: str
    arch: str
    cpu: str
    physical_cores: int
    cores: int
    ram_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...] = ()
    compiler: str = ""
    is_translated: bool = False  # an Intel Python under Rosetta on Apple silicon

    @property
    def is_intel_mac(self) -> bool:
        return self.os.startswith("macOS") and self.arch == "x86_64" and not self.is_translated


class System(Protocol):
    """The operating system, as far as this module needs it."""

    kernel: str  # platform.system(): "Linux", "Darwin", ...
    release: str
    arch: str

    def run(self, command: Sequence[str]) -> str:
        """Standard output of a command; empty when it is absent, fails or hangs."""

    def read(self, path: str) -> str:
        """Text of a small file; empty when it cannot be read."""

    def which(self, name: str) -> str:
        """Full path of a program, or empty."""

    def memory(self) -> tuple[int, int]:
        """(total, available) bytes of RAM, container limits not applied."""

    def cores(self) -> tuple[int, int]:
        """(physical cores, logical cores that this process may run on)."""


class HostSystem:
    """The real one."""

    def __init__(self) -> None:
        self.kernel = platform.system()
        self.release = platform.mac_ver()[0] if self.kernel == "Darwin" else platform.release()
        self.arch = platform.machine()

    def run(self, command: Sequence[str]) -> str:
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=_COMMAND_SECONDS, check=True,
                stdin=subprocess.DEVNULL, text=True, errors="replace",
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout

    def read(self, path: str) -> str:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def which(self, name: str) -> str:
        return shutil.which(name) or ""

    def memory(self) -> tuple[int, int]:
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)

    def cores(self) -> tuple[int, int]:
        import psutil

        usable = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            usable = len(os.sched_getaffinity(0))
        return psutil.cpu_count(logical=False) or usable, usable


@dataclass(frozen=True)
class ScriptedSystem:
    """A machine that a test writes down: files by path, command output by the command's words."""

    kernel: str = "Linux"
    release: str = "6.1"
    arch: str = "x86_64"
    files: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    programs: Mapping[str, str] = field(default_factory=dict)
    ram: tuple[int, int] = (16 << 30, 12 << 30)
    core_counts: tuple[int, int] = (4, 8)

    def run(self, command: Sequence[str]) -> str:
        return self.commands.get(" ".join(command), "")

    def read(self, path: str) -> str:
        return self.files.get(path, "")

    def which(self, name: str) -> str:
        return self.programs.get(name, "")

    def memory(self) -> tuple[int, int]:
        return self.ram

    def cores(self) -> tuple[int, int]:
        return self.core_counts


def read_machine(system: System | None = None) -> Machine:
    """The machine this process runs on. Takes milliseconds; with an NVIDIA driver, a second."""
    system = system or HostSystem()
    total, available = system.memory()
    physical, cores = system.cores()
    if system.kernel == "Linux":
        total, available = _within_memory_limits(system, total, available)
        cores = _within_cpu_quota(system, cores)
    is_mac = system.kernel == "Darwin"
    return Machine(
        os=f"{'macOS' if is_mac else system.kernel} {system.release}".strip(),
        arch=system.arch,
        cpu=_cpu_name(system),
        physical_cores=min(physical, cores) if system.kernel == "Linux" else physical,
        cores=cores,
        ram_bytes=total,
        available_bytes=available,
        gpus=_apple_gpu(system, total, available) if is_mac else nvidia_gpus(system),
        compiler=_compiler(system),
        is_translated=is_mac and _sysctl(system, "sysctl.proc_translated") == "1",
    )


def nvidia_gpus(system: System | None = None) -> tuple[Gpu, ...]:
    """The cards that `nvidia-smi` reports; none where there is no driver."""
    text = (system or HostSystem()).run(_NVIDIA_QUERY)
    gpus = []
    for line in text.splitlines():
        fields = [part.strip() for part in line.split(",")]
        if len(fields) != 5:
            continue
        name, total, free, driver, capability = fields
        gpus.append(Gpu(name, "nvidia", _mebibytes(total), _mebibytes(free), driver, capability))
    return tuple(gpus)


def disk_free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds `path`, or would hold it."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _mebibytes(text: str) -> int:
    return int(text) << 20 if text.isdigit() else 0  # "[N/A]" on unified-memory boards


def _cpu_name(system: System) -> str:
    if system.kernel == "Darwin":
        return _sysctl(system, "machdep.cpu.brand_string") or system.arch
    found = re.search(r"^model name\s*:\s*(.+)$", system.read("/proc/cpuinfo"), re.MULTILINE)
    if found is None:  # ARM kernels name the model only through lscpu
        found = re.search(r"^Model name:\s*(.+)$", system.run(["lscpu"]), re.MULTILINE)
    return found.group(1).strip() if found else system.arch


def _compiler(system: System) -> str:
    """A C++ compiler, which `torch.compile` needs. On macOS the programs exist as mere invitations
    to install the command line tools until `xcode-select -p` names them."""
    if system.kernel == "Darwin" and not system.run(["xcode-select", "-p"]).strip():
        return ""
    for name in (os.environ.get("CXX", ""), *_COMPILERS):
        path = system.which(name) if name else ""
        if path:
            return path
    return ""


def _sysctl(system: System, key: str) -> str:
    return system.run(["sysctl", "-n", key]).strip()


def _apple_gpu(system: System, total: int, available: int) -> tuple[Gpu, ...]:
    """The chip's own GPU. Its share of the memory is `iogpu.wired_limit_mb`, where 0 means the
    system's default: two thirds up to 36 GB, three quarters above."""
    chip = _sysctl(system, "machdep.cpu.brand_string")
    if not chip.startswith("Apple"):
        return ()
    wired = _sysctl(system, "iogpu.wired_limit_mb")
    share = int(wired) << 20 if wired.isdigit() and int(wired) else 0
    if not share:
        share = total * 3 // 4 if total > 36 << 30 else total * 2 // 3
    return (Gpu(f"{chip} GPU", "apple", share, min(share, available)),)


def _within_memory_limits(system: System, total: int, available: int) -> tuple[int, int]:
    """(total, available) under the memory limits of this process's control groups."""
    for folder, limit_name, usage_name in _memory_groups(system):
        limit_text = system.read(f"{folder}/{limit_name}").strip()
        if not limit_text.isdigit() or int(limit_text) >= total:
            continue  # "max", absent, or version 1's huge number for "none"
        limit = int(limit_text)
        usage_text = system.read(f"{folder}/{usage_name}").strip()
        used = int(usage_text) if usage_text.isdigit() else 0
        cached = re.search(
            r"^(?:total_)?inactive_file (\d+)$", system.read(f"{folder}/memory.stat"), re.MULTILINE
        )
        used -= min(used, int(cached.group(1)) if cached else 0)  # the kernel gives cache back
        total, available = limit, min(available, limit - used)
    return total, max(available, 0)


def _memory_groups(system: System) -> list[tuple[str, str, str]]:
    """(folder, limit file, usage file) of this process's groups, from its own up to the root."""
    groups = []
    for line in system.read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = "/sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = "/sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = PurePosixPath(path)
        for place in (inner, *inner.parents):
            groups.append((f"{root}{place}".rstrip("/"), *names))
    return groups


def _within_cpu_quota(system: System, cores: int) -> int:
    """Logical cores under a version 2 `cpu.max` quota."""
    for line in system.read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers:
            continue
        inner = PurePosixPath(path)
        for place in (inner, *inner.parents):
            words = system.read(f"/sys/fs/cgroup{place}".rstrip("/") + "/cpu.max").split()
            if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
                cores = min(cores, max(1, math.ceil(int(words[0]) / int(words[1]))))
    return cores
