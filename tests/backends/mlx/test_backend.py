"""What the backend says of itself, and what it costs to ask."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
from solollm_mlx import backend
from solollm_mlx.backend import APPLE_GPU_PRIORITY, CPU_PRIORITY, MlxBackend
from solollm_mlx.versions import within

from solollm.architecture import ModelConfig
from solollm.backend import ComputeDType, EngineOptions, Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.errors import BackendError


def test_probe_and_construction_import_no_framework() -> None:
    """`solollm --help` asks every backend; importing mlx-lm takes seconds."""
    code = (
        "import sys; from solollm_mlx.backend import MlxBackend as B; probe = B.probe(); B()\n"
        "taken = {'mlx.core', 'mlx_lm', 'transformers'} & set(sys.modules)\n"
        "assert not taken, taken; print(probe.available, probe.device)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "True"


@pytest.mark.parametrize(
    ("system", "machine", "priority"),
    [("darwin", "arm64", APPLE_GPU_PRIORITY), ("linux", "x86_64", CPU_PRIORITY)],
)
def test_priority_follows_the_machine(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, priority: int
) -> None:
    """An Apple GPU comes first of all; MLX on a processor comes after torch."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    probe = MlxBackend.probe()
    assert (probe.available, probe.priority) == (True, priority)


def test_an_intel_mac_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets no wheel, so a command to install one would be no help."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    probe = MlxBackend.probe()
    assert not probe.available
    assert "Intel" in probe.reason


@pytest.mark.parametrize("missing", ["mlx", "mlx[cpu]", "mlx-lm"])
def test_what_is_missing_is_a_reason_and_not_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    """The registry lists it with what to install; a plain `pip install mlx` on Linux leaves the
    library itself out, and importing it then fails."""
    present = ModuleSpec("mlx", None)
    present.submodule_search_locations = [str(tmp_path)]
    found = {"mlx": present, "mlx_lm": present}
    if missing == "mlx-lm":
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "libmlx.so").touch()
        del found["mlx_lm"]
    elif missing == "mlx":
        del found["mlx"]
    monkeypatch.setattr(backend, "find_spec", found.get)
    probe = MlxBackend.probe()
    assert not probe.available
    assert probe.reason.startswith(f"{missing} is not installed")
    assert "pip install" in probe.reason


@pytest.mark.parametrize("found", ["0.32.3", "0.33.0", "1.0", ""])
def test_untested_mlx_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig, found: str
) -> None:
    """A session on another version would fail somewhere in the middle."""
    monkeypatch.setattr(backend, "version", lambda name: found)
    options, plan = SessionOptions(OptimizerTable()), Plan(8, False, "float32", 64, 8)
    with pytest.raises(BackendError, match="is not supported"):
        MlxBackend().train_session(tiny_config, options, plan)


@pytest.mark.parametrize(
    ("found", "is_within"),
    [("0.32.4", True), ("0.32.10", True), ("0.32.4.dev2+abc", True), ("0.32", False), ("x", False)],
)
def test_versions_are_compared_as_numbers(found: str, is_within: bool) -> None:
    """As text, 0.32.10 lies before 0.32.4."""
    assert within(found, "0.32.4", "0.33") is is_within


@pytest.mark.parametrize(
    ("device", "training", "inference"),
    [
        ("Apple M1 Pro", "float32", "float16"),
        ("Apple M2", "float32", "float16"),
        ("Apple M4 Max", "bfloat16", "bfloat16"),
        ("cpu", "float32", "float32"),
    ],
)
def test_dtypes_follow_the_chip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str,
    training: ComputeDType, inference: ComputeDType,
) -> None:  # fmt: skip
    """M1 and M2 compute bf16 by software: there it would be the slowest of the three."""
    monkeypatch.setattr(backend, "_device_name", lambda: device)
    monkeypatch.setattr(backend, "_on_gpu", lambda: device != "cpu")
    capabilities = MlxBackend().capabilities()
    assert (capabilities.device, capabilities.preferred_dtype) == (device, training)
    seen: list[str] = []

    def load(checkpoint: Path, options: EngineOptions) -> None:
        seen.append(options.compute_dtype)

    monkeypatch.setattr("solollm_mlx.engine.MlxEngine.load", load)
    MlxBackend().engine(tmp_path, EngineOptions())
    assert seen == [inference]
