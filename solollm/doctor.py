"""What this machine can do, and what would let it do more: `solollm doctor`.

`examine()` gathers; nothing is changed and nothing leaves the machine. The speed probe runs in a
child process, so that a framework that breaks on import breaks the child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from solollm.backend import Backend, ComputeDType, SessionOptions
from solollm.config import OptimizerTable, RunConfig
from solollm.dial import PRESET_NAMES, horizon, preset
from solollm.dtype_choice import remember
from solollm.errors import PlanError, SoloLLMError
from solollm.hardware import Machine, disk_free_bytes, read_machine
from solollm.host import machine_advice, this_host
from solollm.planner import format_bytes, plan
from solollm.registry import find_backends, missing_backend_fix, select_backend
from solollm.vitals import Vitals

PROBE_SECONDS = 3.0
VOCAB_SIZE = 32_768  # of the models in the table of what fits
# Training reaches about this share of the matrix-multiply rate; docs/results has what was measured.
TRAINING_SHARE = 0.6
_LOW_DISK_BYTES = 10 << 30
_PURPOSES = {
    "zstandard": "read .zst sources",
    "py3langid": "tell languages apart in sources",
    "pyarrow": "read .parquet sources",
    "datasets": "read datasets by id",
    "tensorboardX": "log.sinks tensorboard",
    "trackio": "log.sinks trackio",
    "wandb": "log.sinks wandb, offline",
}


class BackendState(NamedTuple):
    """One installed backend."""

    name: str
    available: bool
    device: str
    reason: str


class Package(NamedTuple):
    """One optional package; `version` is empty where it is missing."""

    name: str
    version: str
    purpose: str
    install: str


class Fit(NamedTuple):
    """Whether a preset can be trained here. `seconds` projects a compute-optimal training from the
    measured speed; None where none was measured. Without a fit, `detail` says what it needs."""

    preset: str
    num_parameters: int
    fits: bool
    memory_bytes: int
    seconds: float | None
    detail: str


class Speed(NamedTuple):
    """The matrix-multiply rate that the probe reached, in units of 1e9 operations per second."""

    gflops: float
    device: str
    dtype: str
    library: str


class DtypeTiming(NamedTuple):
    """Units of 1e9 operations per second in each compute dtype, and the one that runs now take."""

    gflops: Mapping[ComputeDType, float]
    choice: ComputeDType


@dataclass(frozen=True)
class Diagnosis:
    """Everything `solollm doctor` shows. `chosen` is the reason of the backend that runs would
    use, empty if there is none; `advice` is what to change, the weightiest first."""

    machine: Machine
    vitals: Vitals
    python: str
    backends: tuple[BackendState, ...]
    chosen: str
    speed: Speed | None
    dtypes: DtypeTiming | None
    fits: tuple[Fit, ...]
    packages: tuple[Package, ...]
    disk_free_bytes: int
    advice: tuple[str, ...]


def examine(folder: Path | None = None, *, probe_seconds: float = PROBE_SECONDS) -> Diagnosis:
    """Look at this machine; `folder` is where runs would be written (default: here)."""
    machine, vitals = read_machine(), this_host().vitals()
    states = tuple(
        BackendState(c.name, c.probe.available, c.probe.device, c.probe.reason)
        for c in find_backends()
    )
    speed = measure_speed(probe_seconds) if probe_seconds > 0 else None
    dtypes = None
    try:
        backend, chosen = select_backend()
        dtypes = time_dtypes(backend, probe_seconds) if probe_seconds > 0 else None
        fits = tuple(_fits(backend, machine, speed))
        problem = ""
    except SoloLLMError as error:
        chosen, fits, problem = "", (), f"{error.what}: {error.fix}"
    disk = disk_free_bytes(folder or Path())
    return Diagnosis(
        machine=machine,
        vitals=vitals,
        python=sys.version.split()[0],
        backends=states,
        chosen=chosen,
        speed=speed,
        dtypes=dtypes,
        fits=fits,
        packages=tuple(_packages()),
        disk_free_bytes=disk,
        advice=(*_advice(machine, states, disk, problem), *machine_advice(machine, vitals)),
    )


def measure_speed(seconds: float = PROBE_SECONDS) -> Speed | None:
    """Multiply square matrices for about `seconds` in a child process; None if that fails."""
    command = [sys.executable, "-c", _SPEED_SCRIPT, str(seconds)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120 + seconds, check=True
        )
        gflops, device, dtype, library = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return Speed(float(gflops), str(device), str(dtype), str(library))


def time_dtypes(backend: Backend, seconds: float = PROBE_SECONDS) -> DtypeTiming | None:
    """Time the compute dtypes of a GPU in a child process, and keep the choice for the planner;
    None where the backend has nothing to choose or the child fails."""
    capabilities = backend.capabilities()
    if capabilities.device.startswith("cpu"):
        return None
    command = [sys.executable, "-c", _DTYPE_SCRIPT, backend.name, str(seconds)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120 + seconds, check=True
        )
        rates = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    if not rates:
        return None
    return DtypeTiming(
        {name: rate / 1e9 for name, rate in rates.items()}, remember(capabilities, rates)
    )


_DTYPE_SCRIPT = """
import json, sys
from solollm.registry import select_backend
backend = select_backend(sys.argv[1]).backend
print(json.dumps(dict(backend.dtype_rates(float(sys.argv[2])))))
"""


# With PyTorch on its best device; with NumPy where there is no PyTorch.
_SPEED_SCRIPT = """
import json, sys, time
try:
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.backends.mps.is_available():
        device = "mps"
    size, dtype = (1024, torch.float32) if device == "cpu" else (4096, torch.bfloat16)
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    multiply = lambda: torch.mm(a, a, out=out)
    finish = lambda: out[0, 0].item()
    names = [device, str(dtype).removeprefix("torch."), "torch " + torch.__version__]
except ImportError:
    import numpy
    size = 1024
    a = numpy.random.default_rng(0).standard_normal((size, size), numpy.float32)
    out = numpy.empty_like(a)
    multiply = lambda: numpy.matmul(a, a, out=out)
    finish = lambda: None
    names = ["cpu", "float32", "numpy " + numpy.__version__]
for _ in range(3):
    multiply()
finish()
rates, begun = [], time.perf_counter()
while time.perf_counter() - begun < float(sys.argv[1]) or not rates:
    start = time.perf_counter()
    for _ in range(10):
        multiply()
    finish()
    rates.append(10 * 2 * size**3 / (time.perf_counter() - start) / 1e9)
print(json.dumps([sorted(rates)[len(rates) // 2], *names]))
"""


def _fits(backend: Backend, machine: Machine, speed: Speed | None) -> list[Fit]:
    """Every preset, planned with the default optimizer and the dial's batch."""
    options = SessionOptions(OptimizerTable())
    found = []
    for name in PRESET_NAMES:
        model = preset(name, VOCAB_SIZE)
        seq_len, aim = model.max_position_embeddings, horizon(model)
        seconds = None
        if speed is not None:
            work = model.flops_per_token(seq_len) * aim.total_tokens
            seconds = work / (speed.gflops * 1e9 * TRAINING_SHARE)
        rows = max(1, aim.tokens_per_step // seq_len)
        parameters = model.num_parameters()
        try:
            made = plan(
                model, options, RunConfig(), backend,
                batch_size=rows, seq_len=seq_len, machine=machine,
            )  # fmt: skip
        except PlanError as error:
            found.append(Fit(name, parameters, False, 0, seconds, error.what))
            continue
        used = sum(made.memory_bytes.values())
        detail = f"micro-batch {made.micro_batch_size} of {rows}, {made.compute_dtype}"
        if made.activation_checkpointing:
            detail += ", activations recomputed"
        found.append(Fit(name, parameters, True, used, seconds, detail))
    return found


def _packages() -> list[Package]:
    requirements = _optional_requirements()
    found = []
    for name, purpose in _PURPOSES.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = ""
        wanted = requirements.get(name.lower(), name)
        found.append(Package(name, installed, purpose, f"pip install '{wanted}'"))
    return found


def _optional_requirements() -> dict[str, str]:
    """Lower-case name -> requirement, of all our extras: `zstandard` -> `zstandard>=0.22`."""
    found = {}
    for line in requires("solollm") or []:
        requirement, _, marker = line.partition(";")
        if "extra" in marker:
            name = requirement.strip().split(">")[0].split("<")[0].split("[")[0]
            found[name.lower()] = requirement.strip()
    return found


def _advice(machine: Machine, states: Sequence[BackendState], disk: int, problem: str) -> list[str]:
    advice = []
    if problem:
        advice.append(problem)
    if not any(state.available for state in states) and not problem:
        advice.append(missing_backend_fix(machine))
    if any(gpu.vendor == "nvidia" for gpu in machine.gpus) and _torch_is_cpu_build():
        advice.append(
            "an NVIDIA card is here but PyTorch is its CPU build: `pip install --force-reinstall"
            " --no-deps 'torch>=2.11,<2.14'` from an index with the CUDA build"
        )
    if not machine.compiler:
        how = "xcode-select --install" if machine.os.startswith("macOS") else "apt install g++"
        advice.append(f"no C++ compiler: torch.compile stays off; `{how}` turns it on")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) < machine.cores:
        advice.append(f"OMP_NUM_THREADS={threads} leaves {machine.cores} cores partly idle; unset")
    if disk < _LOW_DISK_BYTES:
        advice.append(f"only {format_bytes(disk)} of disk are free; checkpoints need room")
    return advice


def _torch_is_cpu_build() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False
