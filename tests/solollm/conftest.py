"""A real but tiny corpus with its tokenizer, for the tests that train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import HostTensor
from solollm.checkpoint import save_checkpoint
from solollm.data.shards import SPLITS, CorpusIndex, SplitWriter, encode_index, sealed, token_dtype
from solollm.tensorfile import open_weights
from solollm.testing.snapshots import ArraySnapshot, state_at
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import train_tokenizer

_LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODEL_VARIANTS: dict[str, dict[str, Any]] = {
    "theta, untied": {"rope_theta": 500_000.0},
    "llama3 scaling, tied": {
        "rope_theta": 500_000.0, "rope_scaling": _LLAMA3, "tie_word_embeddings": True,
    },
    "llama3 scaling, untied": {"rope_theta": 500_000.0, "rope_scaling": _LLAMA3},
    "qk norm, llama3 scaling, untied": {
        "rope_theta": 500_000.0, "rope_scaling": _LLAMA3, "qk_norm": True, "head_dim": 32,
    },
    "qk norm, tied": {"rope_theta": 500_000.0, "qk_norm": True, "tie_word_embeddings": True},
}  # fmt: skip


def _documents(count: int, first: int) -> list[str]:
    """Texts of unequal length that share words, so that a small model learns something."""
    return [
        f"def number_{n}():\n" + f"    value = {n} + {n % 7}\n" * (1 + n % 5) + "    return value\n"
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    """320 ids: a full byte alphabet and a few merges."""
    return train_tokenizer(_documents(40, 0), 320)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """90 documents to train on, 10 held out; an epoch of about 70 rows of 64 tokens."""
    return write_text_corpus(tmp_path_factory.mktemp("corpora") / "small", small_tokenizer)


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """The same tokenizer, other documents."""
    return write_text_corpus(
        tmp_path_factory.mktemp("corpora") / "other", small_tokenizer, first=500
    )


@pytest.fixture(scope="session", params=list(MODEL_VARIANTS))
def model_variant(request: pytest.FixtureRequest, small_tokenizer: Tokenizer) -> ModelConfig:
    """Models that tell a reader that takes a setting wrongly from one that takes it rightly."""
    return ModelConfig(
        vocab_size=small_tokenizer.padded_vocab_size, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, rms_norm_eps=2e-5, **MODEL_VARIANTS[request.param],
    )  # fmt: skip


@pytest.fixture(scope="session")
def save_telling(small_tokenizer: Tokenizer) -> Callable[[Path, ModelConfig], Path]:
    """Saves a checkpoint of a model whose every setting shows in the logits: a fresh model's
    attention is zero."""

    def save(parent: Path, model: ModelConfig) -> Path:
        rng = np.random.default_rng(0)
        snapshot = ArraySnapshot(model)
        for spec in parameter_table(model):
            values = rng.standard_normal(spec.shape, np.float32) * np.float32(0.15)
            values += np.float32(len(spec.shape) == 1)
            snapshot.weights[spec.name] = HostTensor.of(values)
        return save_checkpoint(
            parent, model=model, snapshot=snapshot, state=state_at(10),
            tokenizer_files=small_tokenizer.files(), token_ids=small_tokenizer.token_ids,
        )  # fmt: skip

    return save


@pytest.fixture(scope="session")
def logits_of() -> Callable[[str, Path, np.ndarray], np.ndarray]:
    """Logits [B, T, V] of a model folder, by "torch" (ours), "transformers" or "mlx" (mlx-lm)."""
    return _logits_of


def _logits_of(reader: str, folder: Path, ids: np.ndarray) -> np.ndarray:
    """In float32; each loads the folder as its users do."""
    if reader == "mlx":
        mlx_lm, mx = pytest.importorskip("mlx_lm"), pytest.importorskip("mlx.core")
        model, _ = mlx_lm.load(str(folder))
        return np.array(model(mx.array(ids)).astype(mx.float32))
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        if reader == "torch":
            from solollm_torch.model import Decoder
            from solollm_torch.state import load_parameters

            decoder = Decoder(ModelConfig.from_hf(json.loads((folder / "config.json").read_text())))
            load_parameters(decoder.masters(), open_weights(folder))
            return decoder.logits(torch.from_numpy(ids)).numpy()
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(torch.from_numpy(ids), use_cache=False).logits.numpy()


def write_text_corpus(corpus: Path, tokenizer: Tokenizer, first: int = 0) -> Path:
    corpus.mkdir()
    records = {}
    for split, texts in zip(
        SPLITS, (_documents(90, first), _documents(10, first + 90)), strict=True
    ):
        with SplitWriter(
            corpus, split, vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        ) as writer:  # fmt: skip
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                writer.add(ids, len(text.encode()))
            records[split] = writer.finish()
    index = CorpusIndex(
        dtype=token_dtype(tokenizer.vocab_size), vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        tokenizer_digest=tokenizer.digest, splits=records,
    )  # fmt: skip
    (corpus / "index.json").write_bytes(encode_index(sealed(index)))
    tokenizer.save(corpus / "tokenizer")
    return corpus
