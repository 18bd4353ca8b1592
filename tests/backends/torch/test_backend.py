"""What the backend says of itself, and what it costs to ask."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from solollm_torch import backend
from solollm_torch.backend import CPU_PRIORITY, CUDA_PRIORITY, TorchBackend

from solollm.architecture import ModelConfig
from solollm.backend import Plan, SessionOptions
from solollm.config import OptimizerTable
from solollm.errors import BackendError


def test_probe_and_construction_import_no_framework() -> None:
    """`solollm --help` asks every backend; importing torch takes seconds."""
    code = (
        "import sys; from solollm_torch.backend import TorchBackend as B; probe = B.probe(); B();"
        "assert 'torch' not in sys.modules, 'imported'; print(probe.available, probe.device)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "True"


def test_a_card_is_preferred_where_driver_and_build_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A CPU build on a machine with a card must not promise the card."""
    sign = tmp_path / "version"
    monkeypatch.setattr(backend, "NVIDIA_DRIVER_SIGNS", (sign,))
    monkeypatch.setattr(backend, "version", lambda name: "2.13.0+cu130")
    assert TorchBackend.probe().priority == CPU_PRIORITY
    sign.touch()
    assert TorchBackend.probe()[2:] == ("cuda", CUDA_PRIORITY)
    monkeypatch.setattr(backend, "version", lambda name: "2.13.0+cpu")
    assert TorchBackend.probe()[2:] == ("cpu", CPU_PRIORITY)


def test_missing_torch_is_a_reason_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry lists it with what to install."""
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    probe = TorchBackend.probe()
    assert not probe.available
    assert "pip install" in probe.reason


def test_capabilities_are_those_of_this_machine() -> None:
    """The planner takes the preferred dtype; it must be one that trains."""
    capabilities = TorchBackend().capabilities()
    assert capabilities.objectives == ("lm", "dpo", "grpo")
    assert capabilities.preferred_dtype in capabilities.train_dtypes
    assert capabilities.versions["torch"] == torch.__version__
    if capabilities.device == "cpu":
        assert capabilities.preferred_dtype == "float32"


@pytest.mark.parametrize("found", ["2.10.1", "2.14.0", "3.0"])
def test_untested_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_config: ModelConfig, found: str
) -> None:
    """A session on another version would fail somewhere in the middle."""
    monkeypatch.setattr(backend, "version", lambda name: found)
    options, plan = SessionOptions(OptimizerTable()), Plan(8, False, "float32", 64, 8)
    with pytest.raises(BackendError, match=f"torch {found} is not supported"):
        TorchBackend().train_session(tiny_config, options, plan)


def test_planned_bytes_grow_with_the_model(tiny_config: ModelConfig) -> None:
    """The planner multiplies these: a sign or unit error would let anything fit."""
    options = SessionOptions(OptimizerTable(name="adamw"))
    small = TorchBackend().memory_costs(tiny_config, options, "float32")
    wide = tiny_config.model_copy(update={"hidden_size": 64, "head_dim": 16})
    large = TorchBackend().memory_costs(wide, options, "float32")
    assert small.per_parameter_bytes == 16
    assert small.per_token_checkpointed_bytes < small.per_token_bytes < large.per_token_bytes
