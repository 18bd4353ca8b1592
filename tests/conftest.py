"""Fixtures shared by every test: one tiny model, the optional folder of real data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from solollm.architecture import ModelConfig

# The files that take longest. They are begun first, so that at the end of a suite that runs in
# several processes none of them is left to one process alone.
_LONGEST = (
    "torch/test_two_ranks.py", "backends/test_migration.py", "solollm/test_supervisor.py",
    "mlx/test_conformance.py", "torch/test_memory.py", "mlx/test_resume.py", "mlx/test_memory.py",
    "serving/test_chat_page.py", "finetune/test_rl.py", "solollm/test_resume_proof.py",
    "torch/test_offload.py", "serving/test_supervision.py", "commands/test_pretrain.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; else in pytest's order."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(_LONGEST))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """SIGINT as a terminal gives it: a suite started in the background inherits it ignored, and so
    would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """A grouped-query model of about 50k parameters that every backend can train in seconds."""
    return ModelConfig(
        vocab_size=192, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (GSM8K, MMLU, Tiny Shakespeare); skips where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SOLOLLM_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SOLOLLM_TEST_DATA to run this test")
    return folder
