"""The spool: duplicates out, order by digest."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from solollm.data import dedup
from solollm.data.dedup import Spool, Spooled, text_digest


def _spool(folder: Path, texts: list[tuple[bytes, int]]) -> Spool:
    folder.mkdir()
    spool = Spool(folder)
    with spool:
        for text, source in texts:
            digest = text_digest(text)
            spool.add(text, digest, source=source, is_validation=digest[15] < 64)
    return spool


@pytest.mark.parametrize("remembered", [0, 10, 10**6])
def test_distinct_texts_come_back_once_in_digest_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered: int
) -> None:
    """Guards exactness with and without the memory of recent digests, for any input order."""
    monkeypatch.setattr(dedup, "_RECENT", remembered)
    texts = [(b"text %d" % (n % 700) * (n % 5 + 1), n) for n in range(2000)]
    distinct = {text for text, _ in texts}
    results: list[list[Spooled]] = []
    for shuffle in range(2):
        random.Random(shuffle).shuffle(texts)
        spool = _spool(tmp_path / f"spool-{remembered}-{shuffle}", texts)
        found = list(spool.documents())
        assert found == list(spool.documents())
        assert {entry.text for entry in found} == distinct
        assert [entry.digest for entry in found] == sorted(text_digest(t) for t in distinct)
        assert all(entry.digest == text_digest(entry.text) for entry in found)
        survey = spool.survey()
        assert survey.documents == len(distinct)
        assert survey.duplicates == len(texts) - len(distinct)
        assert survey.text_bytes == sum(map(len, distinct))
        assert survey.validation_documents == sum(entry.is_validation for entry in found)
        assert survey.train_bytes == sum(len(e.text) for e in found if not e.is_validation)
        longest = {entry.digest: len(entry.text) for entry in found}
        assert longest[survey.longest] == max(longest.values())
        results.append(found)
    assert [e.text for e in results[0]] == [e.text for e in results[1]]


def test_the_first_source_of_a_text_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the report's numbers per source against the order of reading."""
    monkeypatch.setattr(dedup, "_RECENT", 0)
    spool = _spool(tmp_path / "spool", [(b"same", 3), (b"same", 1), (b"same", 2)])
    assert [entry.source for entry in spool.documents()] == [1]


def test_an_empty_spool_is_empty(tmp_path: Path) -> None:
    """Guards the edge that every bucket is at when little text comes in."""
    spool = _spool(tmp_path / "spool", [])
    assert list(spool.documents()) == []
    assert spool.survey().documents == 0
