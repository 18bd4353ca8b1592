"""Synthetic corpora: documents of known ids, without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from solollm.data.shards import (
    SHARD_TOKENS,
    SPLITS,
    CorpusIndex,
    SplitWriter,
    encode_index,
    sealed,
    token_dtype,
)

MakeCorpus = Callable[..., Path]


def _write_corpus(
    corpus: Path, documents: Sequence[Sequence[int]], *, vocab_size: int = 300,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:  # fmt: skip
    """A corpus whose train and validation splits hold `documents` (ids from 2 on; bos 0, eos 1)."""
    corpus.mkdir(parents=True)
    records = {}
    for split in SPLITS:
        with SplitWriter(
            corpus, split, vocab_size=vocab_size, bos_id=0, eos_id=1, shard_tokens=shard_tokens
        ) as writer:
            for ids in documents:
                writer.add(np.array(ids, np.int64), text_bytes=2 * len(ids))
            records[split] = writer.finish()
    index = CorpusIndex(
        dtype=token_dtype(vocab_size), vocab_size=vocab_size, bos_id=0, eos_id=1,
        tokenizer_digest="synthetic", splits=records,
    )  # fmt: skip
    (corpus / "index.json").write_bytes(encode_index(sealed(index)))
    return corpus


@pytest.fixture(scope="session")
def write_corpus() -> MakeCorpus:
    """Writes a synthetic corpus into a named, not yet existing folder."""
    return _write_corpus


@pytest.fixture
def make_corpus(tmp_path: Path) -> MakeCorpus:
    """Writes a synthetic corpus into a fresh folder of `tmp_path`."""

    def make(documents: Sequence[Sequence[int]], name: str = "corpus", **options: int) -> Path:
        return _write_corpus(tmp_path / name, documents, **options)

    return make
