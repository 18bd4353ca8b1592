"""A real but tiny corpus with its tokenizer, for the tests that train."""

from __future__ import annotations

from pathlib import Path

import pytest

from solollm.data.shards import SPLITS, CorpusIndex, SplitWriter, encode_index, sealed, token_dtype
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import train_tokenizer


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
