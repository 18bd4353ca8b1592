"""Token shards and their index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from solollm.data.shards import SplitReader, read_index, shard_path, verify_corpus
from solollm.errors import ConfigError, IntegrityError

MakeCorpus = Callable[..., Path]
DOCUMENTS = [[5, 6, 7], [], [8] * 10, [299]]
STREAM = [0, 5, 6, 7, 1, 0, 1, 0, *[8] * 10, 1, 0, 299, 1]


@pytest.mark.parametrize("shard_tokens", [1, 3, 5, 22, 1000])
def test_documents_come_back_whole_across_shard_borders(
    make_corpus: MakeCorpus, shard_tokens: int
) -> None:
    """Guards the seams: a document over several shards, an empty one, a shard filled exactly."""
    reader = SplitReader(make_corpus(DOCUMENTS, shard_tokens=shard_tokens), "train")
    assert reader.tokens(0, 10**9).tolist() == STREAM
    for number, ids in enumerate(DOCUMENTS):
        assert reader.document(number).tolist() == [0, *ids, 1]
    for start in range(len(STREAM)):
        for stop in range(start, len(STREAM) + 1):
            assert reader.tokens(start, stop).tolist() == STREAM[start:stop]
    assert reader.starts_between(0, 10**9).tolist() == [0, 5, 7, 19]
    assert reader.starts_between(5, 19).tolist() == [5, 7]
    assert reader.starts_between(6, 7).tolist() == []


def test_documents_are_found_among_many(make_corpus: MakeCorpus) -> None:
    """Guards the search over blocks of document starts: its first, last and middle blocks."""
    corpus = make_corpus([[7] * (n % 5) for n in range(2000)])
    reader = SplitReader(corpus, "train")
    expected = np.flatnonzero(reader.tokens(0, 10**6) == 0)
    assert expected.size == 2000
    for first in (0, 1, 2047, 2048, 2049, 4000, 7990, 7999, 8000):
        for last in (first, first + 1, first + 300, 10**6):
            want = expected[(expected >= first) & (expected < last)]
            assert np.array_equal(reader.starts_between(first, last), want)


def test_ids_above_65535_are_stored_whole(make_corpus: MakeCorpus) -> None:
    """Guards against silent wrap-around to 16 bits."""
    corpus = make_corpus([[65_536, 99_999]], vocab_size=100_000)
    assert SplitReader(corpus, "train").document(0).tolist() == [0, 65_536, 99_999, 1]
    with pytest.raises(ValueError, match="outside"):
        make_corpus([[300]], name="too_high")
    with pytest.raises(ValueError, match="outside"):
        make_corpus([[-1]], name="negative")


def test_fingerprint_follows_every_token_and_border(make_corpus: MakeCorpus) -> None:
    """Guards resume against other data: one id or one border moved is another corpus."""
    same, again = make_corpus(DOCUMENTS, "a"), make_corpus(DOCUMENTS, "b")
    assert read_index(same) == read_index(again)
    others = [[[5, 6, 8], [], [8] * 10, [299]], [[5, 6], [7], [8] * 10, [299]], DOCUMENTS[::-1]]
    prints = {read_index(make_corpus(d, f"o{i}")).fingerprint for i, d in enumerate(others)}
    assert len(prints | {read_index(same).fingerprint}) == 4


def test_a_flipped_bit_is_found(make_corpus: MakeCorpus) -> None:
    """Guards against damaged shards and document files going unnoticed."""
    corpus = make_corpus(DOCUMENTS, shard_tokens=7)
    verify_corpus(corpus)
    for path in (shard_path(corpus, "train", 1), corpus / "validation" / "documents.bin"):
        sound = path.read_bytes()
        path.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
        with pytest.raises(IntegrityError, match=path.name):
            verify_corpus(corpus)
        path.write_bytes(sound)


def test_truncated_and_missing_files_are_refused_on_open(make_corpus: MakeCorpus) -> None:
    """Guards against death in the middle of training, by SIGBUS or by tokens made up."""
    corpus = make_corpus(DOCUMENTS)
    path = shard_path(corpus, "train", 0)
    reader = SplitReader(corpus, "train")
    os.truncate(path, 40)
    with pytest.raises(IntegrityError, match="cut short"):
        reader.tokens(0, 22)
    os.truncate(path, 44)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"tokens-00000\.bin is damaged; it holds 43 bytes"):
        SplitReader(corpus, "train")
    path.unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        SplitReader(corpus, "train")


def test_a_changed_or_foreign_index_is_refused(make_corpus: MakeCorpus) -> None:
    """Guards against hand edits, hostile JSON, and folders that are no corpus."""
    corpus = make_corpus(DOCUMENTS)
    path = corpus / "index.json"
    index = json.loads(path.read_bytes())
    path.write_text(json.dumps(index | {"eos_id": 2}))
    with pytest.raises(IntegrityError, match="fingerprint"):
        read_index(corpus)
    for text in ("", "[]", "[" * 100_000, '{"a":' + "9" * 5000 + "}", "\ud800"):
        path.write_text(text, errors="surrogatepass")
        with pytest.raises(IntegrityError, match="damaged"):
            read_index(corpus)
    with pytest.raises(ConfigError, match="solollm data build"):
        read_index(corpus / "nothing")


def test_counts_that_disagree_are_refused(make_corpus: MakeCorpus) -> None:
    """Guards against an index whose documents end elsewhere than its tokens."""
    from solollm.data.shards import CorpusIndex, encode_index, sealed

    corpus = make_corpus(DOCUMENTS)
    index = read_index(corpus)
    record = index.splits["train"].model_copy(update={"tokens": 21})
    forged = index.model_copy(update={"splits": {**index.splits, "train": record}})
    (corpus / "index.json").write_bytes(encode_index(sealed(CorpusIndex(**forged.model_dump()))))
    with pytest.raises(IntegrityError, match="21 tokens"):
        SplitReader(corpus, "train")
    assert SplitReader(corpus, "validation").tokens(0, 3).dtype == np.int32
