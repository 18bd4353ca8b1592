"""Fixtures shared by every test: one tiny model, the optional folder of real data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from solollm.architecture import ModelConfig


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
