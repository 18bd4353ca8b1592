"""mlx-lm's trainer as `bench train` holds it: the same step as ours, and its own batches."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="these tests need mlx")
pytest.importorskip("mlx_lm", reason="these tests need mlx-lm")
from solollm_mlx.backend import MlxBackend
from solollm_mlx.peers import NAME

from solollm.architecture import ModelConfig
from solollm.backend import Copies
from solollm.benchmark import TABLE, Work, bench_train
from solollm.text_benchmark import ROUND_BATCHES, bench_text


@pytest.fixture
def small(tiny_config: ModelConfig) -> ModelConfig:
    return tiny_config.model_copy(update={"max_position_embeddings": 64})


def test_the_trainer_takes_our_step(small: ModelConfig) -> None:
    """Guards a comparison of two different computations: other weights, frozen tensors, an AdamW
    without bias correction, or a row that it pads."""
    measured = bench_train(MlxBackend(), Work(small, 4, 48), rounds=3)
    ours, theirs = measured.stacks
    assert (theirs.name, theirs.is_same) == (NAME, True)
    assert theirs.losses[-1] != theirs.losses[0], "it trains nothing"
    assert min(ours.peak_bytes, theirs.peak_bytes) > 12 * small.num_parameters()
    assert ours.share_of_gemm is not None
    assert (ours.copies, ours.overlap, theirs.copies) == (Copies(0, 0), None, None)


def test_the_trainer_reads_documents_in_its_own_batches(small: ModelConfig) -> None:
    """Guards the handing over: every document once, one loss per batch, padding as it does it."""
    peer = MlxBackend().peer(NAME, small, TABLE, seed=0)
    try:
        documents = [np.arange(5 + 3 * n, dtype=np.int32) for n in range(9)]
        assert len(peer.read(documents, 3, 1e-3)) == 3
        assert len(peer.read(documents[:3], 3, 1e-3)) == 1
    finally:
        peer.close()


def test_documents_are_timed_beside_the_trainer(small: ModelConfig) -> None:
    """Guards the figures of `bench train --text`: both stacks learn from the same documents."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 60, 2 * ROUND_BATCHES * 2)
    documents = [generator.integers(0, 192, n).astype(np.int32) for n in lengths]
    read = bench_text(MlxBackend(), documents, model=small, batch_size=2, rounds=1)
    ours, theirs = read.stacks
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=0.03)
    assert set(read.to_json()["ratios"]) == {NAME}
    assert read.num_documents == len(documents)
