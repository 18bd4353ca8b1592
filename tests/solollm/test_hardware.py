"""Machines read from canned text of their operating systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from solollm.hardware import (
    HostSystem,
    ScriptedSystem,
    disk_free_bytes,
    nvidia_gpus,
    read_machine,
)

GIB = 1 << 30
SMI = (
    "nvidia-smi --query-gpu=name,memory.total,memory.free,driver_version,compute_cap"
    " --format=csv,noheader,nounits"
)
CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD Ryzen 9 7950X 16-Core Processor
cache size\t: 1024 KB
"""


@pytest.fixture(autouse=True)
def _no_compiler_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)


def test_linux_machine_with_two_cards() -> None:
    """Fields of nvidia-smi swapped, or the second card lost."""
    system = ScriptedSystem(
        files={"/proc/cpuinfo": CPUINFO},
        commands={
            SMI: "NVIDIA GeForce RTX 4090, 24564, 23000, 550.54, 8.9\n"
            "NVIDIA GeForce RTX 3060, 12288, 12000, 550.54, 8.6\n"
        },
        programs={"g++": "/usr/bin/g++"},
    )
    machine = read_machine(system)
    assert machine.cpu == "AMD Ryzen 9 7950X 16-Core Processor"
    assert machine.os == "Linux 6.1"
    assert machine.compiler == "/usr/bin/g++"
    assert [gpu.name for gpu in machine.gpus] == [
        "NVIDIA GeForce RTX 4090",
        "NVIDIA GeForce RTX 3060",
    ]
    first = machine.gpus[0]
    assert (first.memory_bytes, first.free_bytes) == (24564 << 20, 23000 << 20)
    assert (first.driver, first.compute_capability) == ("550.54", "8.9")


@pytest.mark.parametrize(
    "text", ["", "NVIDIA-SMI has failed because it couldn't communicate with the driver.\n"]
)
def test_no_usable_driver_means_no_cards(text: str) -> None:
    """A failure message of nvidia-smi parsed as a card."""
    assert nvidia_gpus(ScriptedSystem(commands={SMI: text})) == ()


def test_unified_memory_board_reports_not_available() -> None:
    """`[N/A]` as a memory size crashing the doctor."""
    system = ScriptedSystem(commands={SMI: "NVIDIA GB10, [N/A], [N/A], 580.95, 12.1\n"})
    assert nvidia_gpus(system)[0].memory_bytes == 0


def test_arm_linux_names_its_processor_by_lscpu() -> None:
    """ARM's /proc/cpuinfo has no model name."""
    system = ScriptedSystem(
        arch="aarch64",
        files={"/proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 243.75\n"},
        commands={"lscpu": "Architecture: aarch64\nModel name:      Neoverse-N1\n"},
    )
    assert read_machine(system).cpu == "Neoverse-N1"


def test_cgroup_v2_limit_of_a_parent_counts_and_file_cache_does_not() -> None:
    """A container's 4 GiB ignored, or its page cache counted as used."""
    system = ScriptedSystem(
        files={
            "/proc/self/cgroup": "0::/app/job\n",
            "/sys/fs/cgroup/app/job/memory.max": "max\n",
            "/sys/fs/cgroup/app/memory.max": str(4 * GIB),
            "/sys/fs/cgroup/app/memory.current": str(3 * GIB),
            "/sys/fs/cgroup/app/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
        },
    )
    machine = read_machine(system)
    assert machine.ram_bytes == 4 * GIB
    assert machine.available_bytes == 3 * GIB


def test_cgroup_v1_limit_counts_and_its_huge_default_does_not() -> None:
    """Version 1's 'no limit' number taken for a limit, or its real limit ignored."""
    folder = "/sys/fs/cgroup/memory"
    files = {
        "/proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
        f"{folder}/memory.limit_in_bytes": "9223372036854771712",
    }
    assert read_machine(ScriptedSystem(files=files)).ram_bytes == 16 * GIB
    files |= {f"{folder}/x/memory.limit_in_bytes": str(2 * GIB)}
    files |= {f"{folder}/x/memory.usage_in_bytes": str(GIB)}
    machine = read_machine(ScriptedSystem(files=files))
    assert (machine.ram_bytes, machine.available_bytes) == (2 * GIB, GIB)


def test_cpu_quota_lowers_the_core_count() -> None:
    """A container with 1.5 cores starting 8 threads."""
    files = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n"}
    assert read_machine(ScriptedSystem(files=files)).cores == 2


def _mac(arch: str, **sysctl: str) -> ScriptedSystem:
    commands = {
        f"sysctl -n {key.replace('__', '.')}": value + "\n" for key, value in sysctl.items()
    }
    return ScriptedSystem(
        "Darwin", "15.1", arch, commands=commands, ram=(64 * GIB, 40 * GIB),
        programs={"clang++": "/usr/bin/clang++"},
    )  # fmt: skip


def test_apple_chip_has_a_gpu_with_its_share_of_the_memory() -> None:
    """Unified memory counted whole, though the system caps what the GPU may hold."""
    machine = read_machine(_mac("arm64", machdep__cpu__brand_string="Apple M3 Max"))
    assert machine.os == "macOS 15.1"
    assert machine.gpus[0].name == "Apple M3 Max GPU"
    assert machine.gpus[0].memory_bytes == 48 * GIB
    raised = _mac("arm64", machdep__cpu__brand_string="Apple M3 Max", iogpu__wired_limit_mb="57344")
    assert read_machine(raised).gpus[0].memory_bytes == 56 * GIB


def test_compiler_stub_of_a_mac_without_command_line_tools_does_not_count() -> None:
    """/usr/bin/clang++ exists on every Mac; without the tools it only opens a dialog."""
    system = _mac("arm64", machdep__cpu__brand_string="Apple M1")
    assert read_machine(system).compiler == ""


def test_intel_mac_and_rosetta_are_told_apart() -> None:
    """A translated Python on an M-series Mac told that its Mac is too old."""
    intel = read_machine(_mac("x86_64", machdep__cpu__brand_string="Intel(R) Core(TM) i7"))
    assert intel.is_intel_mac
    assert intel.gpus == ()
    translated = read_machine(
        _mac("x86_64", machdep__cpu__brand_string="Apple M2", sysctl__proc_translated="1")
    )
    assert translated.is_translated
    assert not translated.is_intel_mac


def test_this_machine_can_be_read() -> None:
    """The real edge broken: psutil, /proc or a command that does not exist."""
    machine = read_machine()
    assert 0 < machine.available_bytes <= machine.ram_bytes
    assert machine.cores >= 1
    system = HostSystem()
    assert system.run(["no-such-program-anywhere"]) == ""
    assert system.read("/no/such/file") == ""


def test_disk_space_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    """Asking for the free space of a run that is still to be made."""
    assert disk_free_bytes(tmp_path / "runs" / "new") > 0
