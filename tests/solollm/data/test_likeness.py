"""`--like`: what is most like the given texts stays, and the rest is listed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from solollm.data.build import build_corpus
from solollm.data.inspection import document_texts
from solollm.data.likeness import Counts, Like, choose, features, score
from solollm.data.report import CorpusReport, render_report
from solollm.data.shingles import split_words
from solollm.errors import ConfigError
from solollm.strictfile import strict_json

LAW = ["court", "judge", "plaintiff", "defendant", "duty", "contract", "breach", "appeal"]
SEA = ["harbour", "tide", "sailor", "mast", "anchor", "wave", "storm", "keel", "rope", "deck"]
COMMON = ["the", "of", "and", "to", "in", "a", "that", "it", "was", "for", "with", "on", "as"]


def _text(words: list[str], seed: int, length: int = 60) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(words if place % 2 else COMMON) for place in range(length))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty texts about law, sixty about the sea, and five given ones about law."""
    path = tmp_path / "crawl"
    path.mkdir()
    for number in range(20):
        (path / f"law{number:02d}.txt").write_text(_text(LAW, number))
    for number in range(60):
        (path / f"sea{number:02d}.txt").write_text(_text(SEA, 100 + number))
    (tmp_path / "own").mkdir()
    for number in range(5):
        (tmp_path / "own" / f"{number}.txt").write_text(_text(LAW, 1000 + number, 200))
    return path


def _build(folder: Path, out: Path, **options: object) -> tuple[list[str], CorpusReport]:
    report = build_corpus([folder], out, vocab_size=512, **options)  # type: ignore[arg-type]
    texts = [t for split in ("train", "validation") for t in document_texts(out, split)]
    return texts, report


def test_the_domain_is_found(folder: Path, tmp_path: Path) -> None:
    """Guards the choice, the share, the sum, the records and the words."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    law = sum(size for name, size in sizes.items() if name.startswith("law"))
    like = Like([str(tmp_path / "own")], (law + 1) / sum(sizes.values()))
    texts, report = _build(folder, tmp_path / "c", like=like)
    kept = sum("court" in text or "plaintiff" in text for text in texts)
    assert kept >= len(texts) - 1  # the end of one document is held out
    assert report.kept == 20
    assert report.dropped["unlike the given texts"].count == 60
    assert sum(split.text_bytes for split in report.splits.values()) == law
    lines = (tmp_path / "c" / "unlike.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 60
    assert all(record["likeness"] < 0 for record in records)
    assert "of 80 texts the 20 that are most like" in render_report(report)


def test_scores_are_means_of_log_ratios() -> None:
    """Guards the formula by plain counting: words and pairs apart, the prior, unknown words."""
    wanted, everything = Counts(), Counts()
    for text in ("a b a", "c d"):
        everything.add(text)
    wanted.add("a b")
    ratios = wanted.beside(everything)
    assert len(features("a b a")) == 5
    assert features("").size == 0
    size, prior = 1 << 17, 2.0**14
    first = features("a")[0]

    def expected(own: int, total_own: int, count: int, total: int) -> float:
        base = (count + 1 / size) / (total + 1)
        return float(np.log((own + prior * base) / (total_own + prior) / base))

    assert ratios[first] == pytest.approx(expected(1, 3, 2, 8))
    assert ratios[features("c")[0]] == pytest.approx(expected(0, 3, 1, 8))
    assert score("a", ratios) == pytest.approx(ratios[first])
    assert score("a b", ratios) == pytest.approx(ratios[features("a b")].mean())
    assert score("?!", ratios) == ratios.min() < 0
    assert split_words("a").hashes[0] >> np.uint64(48) == first


def test_the_highest_scores_fill_the_share() -> None:
    """Guards the edge: what would go over it, equal scores, and a first text larger than it."""
    scores, sizes = np.array([1.0, 3, 2, 2]), np.array([10, 40, 30, 20])
    assert choose(scores, sizes, 0.7).tolist() == [False, True, True, False]
    assert choose(scores, sizes, 0.69).tolist() == [False, True, False, False]
    assert choose(scores, sizes, 0.1).tolist() == [False, True, False, False]
    assert choose(scores, sizes, 0.999).tolist() == [False, True, True, True]


def test_it_comes_after_near_duplicates(folder: Path, tmp_path: Path) -> None:
    """Guards the two selections together: none gives back what the other left out."""
    twin = (folder / "law00.txt").read_text()
    (folder / "twin.txt").write_text(twin.replace("court", "Court", 1) + " end")
    like = Like([str(tmp_path / "own")], 0.9)
    texts, report = _build(folder, tmp_path / "c", like=like, near_duplicates=0.8)
    assert report.dropped["near duplicate"].count == 1
    assert sum(text.lower().startswith(twin[:50].lower()) for text in texts) <= 1
    assert report.unaccounted == 0


def test_equal_texts_give_an_equal_corpus(folder: Path, tmp_path: Path) -> None:
    """Guards fingerprints against the order of sources."""
    own = str(tmp_path / "own")
    first = _build(folder, tmp_path / "a", like=Like([own], 0.3))[1].fingerprint
    files = sorted(map(str, folder.iterdir()), reverse=True)
    report = build_corpus(files, tmp_path / "b", vocab_size=512, like=Like([own], 0.3))
    assert report.fingerprint == first


def test_settings_and_sources_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    """Guards slips; nothing is written."""
    (tmp_path / "empty").mkdir()
    for share in (0, 1, -1, float("nan")):
        with pytest.raises(ConfigError, match="share of text"):
            Like([str(folder)], share)
    with pytest.raises(ConfigError, match="does not exist"):
        Like([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="holds no text"):
        _build(folder, tmp_path / "c", like=Like([str(tmp_path / "empty")]))
    (tmp_path / "empty" / "dots.txt").write_text("... !!!")
    with pytest.raises(ConfigError, match="holds no text"):
        _build(folder, tmp_path / "c", like=Like([str(tmp_path / "empty")]))
    assert not (tmp_path / "c").exists()


def test_texts_without_words_are_recorded_as_json(folder: Path, tmp_path: Path) -> None:
    """Guards `-Infinity`, which is no JSON."""
    (folder / "dots.txt").write_text("... !!!")
    _build(folder, tmp_path / "c", like=Like([str(tmp_path / "own")], 0.5))
    lines = (tmp_path / "c" / "unlike.jsonl").read_text().splitlines()
    records = [strict_json(line.encode()) for line in lines]
    assert any(record["beginning"] == "... !!!" for record in records)
