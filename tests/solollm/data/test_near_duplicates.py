"""Near duplicates: what counts as one, which are found, and what a build makes of them."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solollm.data import near_duplicates
from solollm.data.build import build_corpus
from solollm.data.dedup import text_digest
from solollm.data.inspection import corpus_tokenizer
from solollm.data.near_duplicates import NearDuplicate, find_near_duplicates, jaccard, signature
from solollm.data.shards import SPLITS, SplitReader
from solollm.data.shingles import shingles, split_words
from solollm.errors import ConfigError

VOCABULARY = [f"word{number}" for number in range(3000)]


def drawn_text(rng: random.Random, words: int = 120) -> str:
    return " ".join(rng.choice(VOCABULARY) for _ in range(words))


def varied(text: str, changes: int, rng: random.Random) -> str:
    """The text with some words replaced."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), changes):
        words[place] = f"new{rng.randrange(10**6)}"
    return " ".join(words)


def plain_shingles(text: str) -> set[tuple[str, ...]]:
    """The definition, for texts in Latin letters."""
    words = re.findall(r"[a-z0-9äöüß]+", text.lower())
    width = min(5, len(words))
    return (
        {tuple(words[at : at + width]) for at in range(len(words) - width + 1)} if words else set()
    )


def plain_share(first: str, second: str) -> float:
    one, other = plain_shingles(first), plain_shingles(second)
    return len(one & other) / len(one | other)


# --- what two texts share ------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.text(alphabet="abAB ä09.,-\n\t'", max_size=80))
def test_shingles_are_runs_of_five_words(text: str) -> None:
    """A word that begins where another ends, or a window too many, changes every share."""
    found = shingles(text)
    assert len(found) == len(plain_shingles(text))
    assert (found[1:] > found[:-1]).all()


def test_case_and_punctuation_do_not_count() -> None:
    """A reprint differs in quotation marks and blanks first of all."""
    one = "“The quick brown fox, it jumps!”  He said (twice)."
    other = "the QUICK brown fox it\njumps - he said 'twice'"
    np.testing.assert_array_equal(shingles(one), shingles(other))
    assert not np.array_equal(shingles(one), shingles(one.replace("fox", "ox")))


def test_scripts_without_spaces_have_words() -> None:
    """A Chinese page would be one word, and two versions of it would share nothing."""
    assert len(split_words("日本語のテスト").hashes) == 7
    assert len(split_words("แมวดำ").hashes) == 5
    assert len(split_words("Привет, мир").hashes) == 2
    assert len(split_words("مرحبا بالعالم").hashes) == 2
    assert len(split_words("한국어 문장").hashes) == 2
    assert len(split_words("e\u0301te\u0301").hashes) == 1  # marks belong to their letter
    page = "我们在这里学习如何训练一个语言模型并且保存它的所有状态" * 3
    assert jaccard(shingles(page), shingles(page.replace("如何", "怎样"))) > 0.5


def test_long_words_and_long_texts() -> None:
    """Powers are tabled for 65,536 characters; a longer run must not fail, nor equal another."""
    long = "x" * 70_000
    assert len(split_words(long).hashes) == 1
    assert split_words(long).hashes != split_words("y" + long[1:]).hashes
    rng = random.Random(0)
    text = drawn_text(rng, 40_000)
    assert len(shingles(text)) == len(plain_shingles(text))


def test_signatures_estimate_the_share() -> None:
    """A hash that mixes badly is right on average and misses pairs: the spread is checked too."""
    rng = np.random.default_rng(0)
    for share in (0.5, 0.8, 0.95):
        estimates = []
        for _ in range(100):
            common = round(800 * share / (1 + share))
            whole = rng.integers(0, 2**63, 800 - common, dtype=np.uint64)
            first, second = np.unique(whole[:400]), np.unique(whole[400 - common :])
            assert jaccard(first, second) == pytest.approx(share, abs=0.01)
            estimates.append(float((signature(first) == signature(second)).mean()))
        expected = (share * (1 - share) / near_duplicates.BANDS / near_duplicates.ROWS) ** 0.5
        assert np.mean(estimates) == pytest.approx(share, abs=0.015)
        assert np.std(estimates) < 1.3 * expected


# --- which are found -----------------------------------------------------------------------------


def test_the_result_is_that_of_comparing_all_with_all(tmp_path: Path) -> None:
    """The bands may miss a pair that is not much alike; above the threshold they must not, and
    below it nothing may go."""
    rng = random.Random(3)
    texts = [drawn_text(rng) for _ in range(150)]
    texts += [varied(rng.choice(texts), rng.choice([1, 2, 3, 5, 8, 20]), rng) for _ in range(150)]
    rng.shuffle(texts)
    kept: list[int] = []
    expected: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        like = [other for other in kept if plain_share(text, texts[other]) >= 0.8]
        if like:
            expected[number] = like
        else:
            kept.append(number)
    found = find_near_duplicates(texts, 0.8, tmp_path)
    assert [pair.text for pair in found] == list(expected)
    assert 40 < len(found) < 120
    for pair in found:
        assert pair.like in expected[pair.text]
        assert pair.similarity == pytest.approx(plain_share(texts[pair.text], texts[pair.like]))


def test_the_end_of_a_chain_stays(tmp_path: Path) -> None:
    """Ten versions, each like the one before: the tenth is another text, and if the links went
    because of links that went, nobody would have it."""
    rng = random.Random(1)
    versions = [drawn_text(rng)]
    for _ in range(9):
        versions.append(varied(versions[-1], 2, rng))
    assert all(plain_share(a, b) >= 0.8 for a, b in pairwise(versions))
    found = find_near_duplicates(versions, 0.8, tmp_path)
    out = {pair.text for pair in found}
    assert 1 in out
    assert len(versions) - len(out) >= 2
    assert not out & {pair.like for pair in found}
    assert all(plain_share(versions[p.text], versions[p.like]) >= 0.8 for p in found)


def test_many_copies_are_not_compared_all_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thousand copies of a licence with other names in them: two million pairs."""
    rng = random.Random(2)
    licence = drawn_text(rng, 60)
    texts = [f"{licence} name{number}" for number in range(2000)]
    calls = []
    monkeypatch.setattr(
        near_duplicates, "jaccard", lambda a, b: calls.append(None) or jaccard(a, b)
    )
    found = find_near_duplicates(texts, 0.8, tmp_path)
    assert {pair.text for pair in found} == set(range(1, 2000))
    assert {pair.like for pair in found} == {0}
    assert len(calls) < 3000


def test_short_texts_are_left_alone(tmp_path: Path) -> None:
    """Lines of a dialogue and table rows are alike by chance, and each is one."""
    texts = [
        "yes of course",
        "Yes, of course!",
        "He paid 5 euros for it",
        "he paid 5 euros for it.",
        "",
    ]
    assert find_near_duplicates(texts, 0.8, tmp_path) == []


def test_no_texts(tmp_path: Path) -> None:
    """An empty folder is said by the build, not by an exception of NumPy's."""
    assert find_near_duplicates([], 0.8, tmp_path) == []
    one = find_near_duplicates([drawn_text(random.Random(0))], 0.8, _new(tmp_path / "one"))
    assert one == []


def test_the_threshold_is_met_exactly(tmp_path: Path) -> None:
    """At 1 only texts of the same words go."""
    rng = random.Random(5)
    text = drawn_text(rng)
    texts = [text, text.upper() + "!", varied(text, 1, rng)]
    assert find_near_duplicates(texts, 1.0, tmp_path) == [NearDuplicate(1, 0, 1.0)]


# --- in a build ----------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """60 texts, 30 of them with one word changed again, one equal, one short pair."""
    rng, folder = random.Random(7), _new(tmp_path / "library")
    texts = [drawn_text(rng) for _ in range(60)]
    texts += [varied(text, 1, rng) for text in texts[:30]]
    texts += [texts[0], "a short line", "A short line!"]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "rows.jsonl").write_text(rows)
    return folder


def stored(corpus: Path) -> list[str]:
    tokenizer, texts = corpus_tokenizer(corpus), []
    for split in SPLITS:
        reader = SplitReader(corpus, split)
        texts += [tokenizer.decode(reader.document(n)) for n in range(reader.record.documents)]
    return texts


def test_a_build_says_what_went_and_why(library: Path, tmp_path: Path) -> None:
    """Nothing vanishes: every text is kept or on a line of its own, beside what it is like."""
    out = tmp_path / "corpus"
    report = build_corpus([library], out, vocab_size=320, near_duplicates=0.8)
    assert (report.items, report.kept, report.duplicates) == (93, 62, 1)
    assert report.dropped["near duplicate"].count == 30
    assert report.unaccounted == 0
    texts = stored(out)
    assert len(texts) == 62
    assert not find_near_duplicates(texts, 0.8, _new(tmp_path / "again"))
    lines = [json.loads(line) for line in (out / "near_duplicates.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    digests = {text_digest(text.encode()).hex() for text in texts}
    for line in lines:
        assert line["similarity"] >= 0.8
        assert line["source"] == line["like"]["source"] == "library"
        assert line["like"]["digest"] in digests
        assert line["digest"] not in digests
        assert any(text.startswith(line["like"]["beginning"]) for text in texts)
    example = report.dropped["near duplicate"].examples[0]
    assert re.fullmatch(r"0\.\d\d like one of library", example.detail)


def test_without_the_option_only_equal_texts_go(library: Path, tmp_path: Path) -> None:
    """Corpora that were built before keep their fingerprint."""
    report = build_corpus([library], tmp_path / "corpus", vocab_size=320)
    assert (report.kept, report.duplicates, dict(report.dropped)) == (92, 1, {})
    assert not (tmp_path / "corpus" / "near_duplicates.jsonl").exists()


def test_the_corpus_does_not_depend_on_the_order_of_reading(library: Path, tmp_path: Path) -> None:
    """Which of two versions stays is decided by their content."""
    rows = (library / "rows.jsonl").read_text().splitlines(keepends=True)
    random.Random(1).shuffle(rows)
    other = _new(tmp_path / "other")
    (other / "b.jsonl").write_text("".join(rows[:40]))
    (other / "a.jsonl").write_text("".join(rows[40:]))
    reports = [
        build_corpus([source], tmp_path / f"of-{source.name}", vocab_size=320, near_duplicates=0.8)
        for source in (library, other)
    ]
    assert reports[0].fingerprint == reports[1].fingerprint


@pytest.mark.parametrize("share", [0.3, 1.2, float("nan")])
def test_a_share_that_is_none_is_refused(share: float, library: Path, tmp_path: Path) -> None:
    """80 for 80% would leave everything in, 0.08 would leave one text."""
    with pytest.raises(ConfigError, match=r"not a share from 0\.5 to 1"):
        build_corpus([library], tmp_path / "corpus", near_duplicates=share)
    assert not (tmp_path / "corpus").exists()


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
