"""A built corpus as people read it: documents, and the rows of a batch with their borders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solollm.backend import IGNORED
from solollm.data.canaries import read_canaries
from solollm.data.shards import TOKENIZER_FOLDER, Split, SplitReader
from solollm.data.stream import open_stream
from solollm.errors import IntegrityError
from solollm.tokenizer import Tokenizer


class DocumentView(NamedTuple):
    """One document: its number in the split, its tokens with bos and eos, its text, and whether it
    is a canary that the build planted."""

    number: int
    tokens: int
    text: str
    canary: bool = False


class RowView(NamedTuple):
    """One row of a batch: how many of its positions are targets, and the text of each document in
    it, special tokens spelt out. A piece without <|bos|> began in another row."""

    row: int
    targets: int
    pieces: tuple[str, ...]


def corpus_tokenizer(corpus: Path) -> Tokenizer:
    """The tokenizer that a corpus was built with.

    Raises:
        IntegrityError: it is missing, or is not the one that the index names.
    """
    promised = SplitReader(corpus, "train").index.tokenizer_digest
    tokenizer = Tokenizer.load(corpus / TOKENIZER_FOLDER)
    if tokenizer.digest != promised:
        raise IntegrityError(
            f"{corpus / TOKENIZER_FOLDER} is not the tokenizer of this corpus",
            why=f"its digest is {tokenizer.digest}, the index says {promised}",
            fix="build the corpus again",
        )
    return tokenizer


def document_texts(corpus: Path, split: Split) -> Iterator[str]:
    """The text of every document of a split, in order. Raises IntegrityError."""
    reader, tokenizer = SplitReader(corpus, split), corpus_tokenizer(corpus)
    for number in range(reader.record.documents):
        yield tokenizer.decode(reader.document(number).tolist())


def view_documents(
    corpus: Path, *, split: Split = "train", first: int = 0, count: int = 3
) -> list[DocumentView]:
    """`count` documents from number `first` on. Raises ConfigError past the end."""
    reader, tokenizer = SplitReader(corpus, split), corpus_tokenizer(corpus)
    canaries = read_canaries(corpus)
    planted = {canary.text for canary in canaries.planted} if canaries else set()
    views = []
    for number in range(first, max(first + 1, min(first + count, reader.record.documents))):
        ids = reader.document(number)
        text = tokenizer.decode(ids.tolist())
        views.append(DocumentView(number, ids.size, text, text in planted))
    return views


def view_batch(
    corpus: Path, step: int, *, split: Split = "train", seq_len: int = 256, batch_size: int = 2,
    seed: int = 0,
) -> list[RowView]:  # fmt: skip
    """The rows that a run with these settings trains on at `step`."""
    tokenizer = corpus_tokenizer(corpus)
    stream = open_stream(corpus, split=split, seq_len=seq_len, batch_size=batch_size, seed=seed)
    batch = stream.batch(step)
    assert batch.segment_ids is not None
    views = []
    for row in range(batch_size):
        borders = np.flatnonzero(np.diff(batch.segment_ids[row])) + 1
        pieces = np.split(batch.input_ids[row], borders)
        texts = [tokenizer.decode(ids.tolist(), skip_special=False) for ids in pieces]
        views.append(RowView(row, int((batch.labels[row] != IGNORED).sum()), tuple(texts)))
    return views
