"""Packing and reading of the documents that `bench train --text` trains on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from solollm.errors import DataError
from solollm.testing.toy import ToyBackend
from solollm.text_benchmark import bench_text, pack, read_documents


def test_every_token_but_a_documents_first_is_a_target_once() -> None:
    """Guards the count of useful tokens: one lost at the end of a row or left over, doubled, or
    taken from a neighbour."""
    documents = [np.arange(100 * n, 100 * n + size) for n, size in enumerate((5, 17, 2, 30), 1)]
    batches, left = pack(documents, rows=2, seq_len=8)
    more, rest = pack([*left, np.arange(500, 520)], rows=2, seq_len=8)
    assert {batch.input_ids.shape for batch in [*batches, *more]} == {(2, 8)}
    inputs, labels = (
        np.concatenate([getattr(b, field).reshape(-1) for b in [*batches, *more]])
        for field in ("input_ids", "labels")
    )
    expected = np.concatenate([d[1:] for d in [*documents, np.arange(500, 520)]])
    assert len(rest) == 1
    np.testing.assert_array_equal([*labels, *rest[0][1:]], expected)
    np.testing.assert_array_equal(inputs + 1, labels)
    for batch in [*batches, *more]:
        same = np.diff(batch.segment_ids, axis=1) == 0
        np.testing.assert_array_equal(same, np.diff(batch.input_ids // 100, axis=1) == 0)
        assert (np.diff(batch.segment_ids, axis=1) >= 0).all()


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_documents_are_the_texts_own(tmp_path: Path, suffix: str) -> None:
    """Guards what counts as a document, the cut, and an order that is the same each time."""
    texts = [f"item {n} " + "word " * n for n in range(20)]
    path = tmp_path / f"text{suffix}"
    rows = [json.dumps({"text": text, "id": 1}) for text in texts]
    path.write_text("\n".join(rows) if suffix == ".jsonl" else "\n\n".join(texts))
    documents = read_documents(path, 400, longest=12, most=10)
    again = read_documents(path, 400, longest=12, most=10)
    assert len(documents) == 10
    assert max(map(len, documents)) == 12
    for one, other in zip(documents, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_too_few_documents_are_refused() -> None:
    """Guards rounds that would silently read the same text again."""
    with pytest.raises(DataError, match="too few for 2 rounds"):
        bench_text(ToyBackend(), [np.arange(9)] * 7, batch_size=2, rounds=1)
