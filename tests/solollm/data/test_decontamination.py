"""`--decontaminate`: no text that holds an item of a benchmark, and no other text, is left out."""

from __future__ import annotations

import gzip
import json
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from solollm.data.benchmark_items import read_items
from solollm.data.build import build_corpus
from solollm.data.decontamination import (
    LEAST_WORDS,
    WORDS,
    ItemIndex,
    LookedFor,
    looked_for,
    measure_overlap,
)
from solollm.data.inspection import document_texts
from solollm.data.intake import Screening
from solollm.data.report import read_report, render_report
from solollm.data.shingles import Runs, split_words
from solollm.errors import ConfigError, DataError, IntegrityError

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    " How many clips did Natalia sell altogether in April and May?"
)
SHORT = "Which organ makes the hormone that lowers blood sugar?"  # 9 words
TOO_SHORT = "What is the capital of France?"


def _words(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [f"w{generator.randrange(10**6)}" for _ in range(count)]


def _held(items: list[str], text: str) -> list[int]:
    return ItemIndex(items).find(Runs(split_words(text).hashes)).tolist()


def test_runs_are_found_and_nothing_else() -> None:
    """Guards both lengths, case, punctuation, place, and one word fewer."""
    items = [QUESTION, SHORT, TOO_SHORT]
    around = " ".join(_words(50, 1))
    run = QUESTION.upper().replace(",", " -").split()[4 : 4 + WORDS + 2]  # two of them are dashes
    assert _held(items, f"{around} {' '.join(run)} {around}") == [0]
    assert _held(items, " ".join(QUESTION.split()[:WORDS])) == [0]
    assert _held(items, " ".join(QUESTION.split()[-WORDS:])) == [0]
    assert _held(items, " ".join(QUESTION.split()[: WORDS - 1])) == []
    assert _held(items, f"{around}: {SHORT.lower()}") == [1]
    assert _held(items, " ".join(SHORT.split()[:-1])) == []
    assert _held(items, f"{TOO_SHORT} {TOO_SHORT}") == []
    assert _held(items, f"{SHORT}\n{QUESTION}") == [0, 1]
    assert _held(items, "") == _held([], QUESTION) == []


def test_against_plain_search() -> None:
    """Guards the index, its filter and several items at once by searching all in all."""
    generator = random.Random(3)
    items = [_words(generator.randint(5, 40), seed) for seed in range(300)]
    texts = []
    for seed in range(60):
        text = _words(200, 1000 + seed)
        for _ in range(3):
            item = generator.choice(items)
            start = generator.randrange(len(item))
            text[50:50] = item[start : start + generator.randint(5, 20)]
        texts.append(text)

    def plain(item: list[str], text: list[str]) -> bool:
        width = min(WORDS, len(item))
        runs = {tuple(item[at : at + width]) for at in range(len(item) - width + 1)}
        found = {tuple(text[at : at + width]) for at in range(len(text) - width + 1)}
        return width >= LEAST_WORDS and not runs.isdisjoint(found)

    index = ItemIndex(map(" ".join, items))
    long = [item for item in items if len(item) >= LEAST_WORDS]
    assert index.num_too_short == len(items) - len(long) > 0
    found = [index.find(Runs(split_words(" ".join(text)).hashes)).tolist() for text in texts]
    assert found == [[n for n, item in enumerate(long) if plain(item, text)] for text in texts]
    assert any(found)


def test_how_a_benchmark_asks_is_no_item() -> None:
    """Guards texts that share a phrase which every question begins with."""
    phrase = "Read the following passage with care and then choose the best of the four answers"
    items = [f"{phrase}: {' '.join(_words(20, seed))}" for seed in range(30)]
    assert _held(items, f"He said: {phrase}.") == []
    assert _held(items, items[7]) == [7]


def test_items_are_spelt_as_corpora_are(notes: Path, tmp_path: Path) -> None:
    """Guards a benchmark in NFD: it was never found, and said to have been looked for."""
    asked = "Où la mère de René a-t-elle caché les clés près du café, après l'été dernier passé?"
    decomposed = unicodedata.normalize("NFD", asked)
    assert decomposed != asked
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": decomposed}) + "\n")
    (notes / "leak.txt").write_text(f"Dites-moi: {asked}")
    screening = Screening(decontaminate=[str(tmp_path / "q.jsonl")])
    report = build_corpus([notes], tmp_path / "c", vocab_size=512, screening=screening)
    assert report.decontaminated[0].found == 1
    assert looked_for(tmp_path / "c", [asked, decomposed]) == LookedFor(2, 0, 0)
    (found,) = measure_overlap([str(tmp_path / "q.jsonl")], [decomposed])
    assert dict(found.held) == {0: 1}
    (found,) = measure_overlap([str(tmp_path / "q.jsonl")], ["\ud800 " + asked])
    assert dict(found.held) == {0: 1}


def test_what_cannot_be_looked_for_is_not_said_to_be(notes: Path, tmp_path: Path) -> None:
    """Guards items that differ in their last word alone, and one that stands there many times."""
    shared = "Of these two statements about rings and fields which is true and which is false now"
    rows = [f"{shared}: {n}" for n in range(12)] + [QUESTION] * 12
    # Their last runs are of their own; without them nothing is.
    rows += [" ".join(shared.split()[:13])]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in rows))
    (notes / "leak.txt").write_text(f"He said: {shared}.")
    screening = Screening(decontaminate=[str(tmp_path / "q.jsonl")])
    report = build_corpus([notes], tmp_path / "c", vocab_size=512, screening=screening)
    (found,) = report.decontaminated
    assert (found.items, found.too_common, found.found) == (13, 1, 1)  # the forum's question
    assert "of words alone that many items share: 1" in render_report(report)
    assert looked_for(tmp_path / "c", rows) == LookedFor(24, 1, 0)
    assert "He said" in "\n".join(
        text for split in ("train", "validation") for text in document_texts(tmp_path / "c", split)
    )


def test_names_of_any_bytes(notes: Path, tmp_path: Path) -> None:
    """Guards a traceback, and the report's lines."""
    path = tmp_path / os.fsdecode(b"q\xff\n\x1b[2J.jsonl")
    path.write_text(json.dumps({"question": QUESTION}) + "\n")
    screening = Screening(decontaminate=[str(path)])
    report = build_corpus([notes], tmp_path / "c", vocab_size=512, screening=screening)
    assert report.decontaminated[0].source == "q\ufffd \ufffd[2J.jsonl"
    assert report.decontaminated[0].found == 1


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(" ".join(_words(300, number)))
    (folder / "forum.txt").write_text(f"Can you help me with this? {QUESTION} Thanks!")
    (folder / "quiz.txt").write_text(f"Our quiz: {SHORT} The pancreas.")
    return folder


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    other = " ".join(_words(30, 99))
    rows = [QUESTION, SHORT, TOO_SHORT, other]
    path.write_text("".join(json.dumps({"question": q, "answer": "#### 1"}) + "\n" for q in rows))
    return path


def test_a_build_leaves_them_out_and_says_so(notes: Path, benchmark: Path, tmp_path: Path) -> None:
    """Guards the sum, the record, the words, and what an evaluation asks afterwards."""
    screening = Screening(decontaminate=[str(benchmark)])
    report = build_corpus([notes], tmp_path / "c", vocab_size=512, screening=screening)
    assert (report.items, report.kept) == (10, 8)
    assert report.dropped["benchmark item"].count == 2
    (found,) = report.decontaminated
    assert (found.source, found.items, found.too_short) == ("questions.jsonl", 3, 1)
    assert (found.found, found.texts) == (2, 2)
    assert read_report(tmp_path / "c") == report
    lines = (tmp_path / "c" / "contamination.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["notes/forum.txt", "notes/quiz.txt"]
    assert json.loads(lines[0])["items"] == {"questions.jsonl": 1}
    told = render_report(report)
    assert "questions.jsonl: 2 of 3 items found; texts left out: 2; items too short" in told
    kept = "\n".join(
        text for split in ("train", "validation") for text in document_texts(tmp_path / "c", split)
    )
    assert "Natalia" not in kept
    assert "quiz" not in kept
    asked = [*read_items(str(benchmark)), " ".join(_words(40, 7))]
    assert looked_for(tmp_path / "c", asked) == LookedFor(3, 1, 1)


def test_without_the_option_nothing_is_looked_for(notes: Path, tmp_path: Path) -> None:
    """Guards the default, and a claim that nobody checked."""
    report = build_corpus([notes], tmp_path / "c", vocab_size=512)
    assert (report.kept, report.decontaminated) == (10, ())
    assert not list((tmp_path / "c").glob("*contamina*"))
    assert looked_for(tmp_path / "c", [QUESTION]) == LookedFor(0, 1, 0)


def test_what_a_corpus_holds_can_be_measured(notes: Path, benchmark: Path, tmp_path: Path) -> None:
    """Guards a corpus that was built before anybody thought of it."""
    build_corpus([notes], tmp_path / "c", vocab_size=512, validation_fraction=0)
    (found,) = measure_overlap([str(benchmark)], document_texts(tmp_path / "c", "train"))
    assert dict(found.held) == {0: 1, 1: 1}
    assert (len(found.beginnings), found.num_too_short) == (3, 1)


def test_a_damaged_list_is_refused(tmp_path: Path) -> None:
    """Guards a claim from a torn or sorted-otherwise file."""
    for content in (b"1234567", np.array([3, 1], "<u8").tobytes()):
        (tmp_path / "decontaminated.bin").write_bytes(content)
        with pytest.raises(IntegrityError, match="is damaged"):
            looked_for(tmp_path, [QUESTION])


def test_formats_that_benchmarks_come_in(tmp_path: Path) -> None:
    """Guards MMLU's CSV with and without names, JSON, fields of other benchmarks, and folders."""
    named, bare = tmp_path / "named.csv", tmp_path / "bare.csv"
    named.write_text('subject,question,A\nlaw,"Who, then?",x\n\nlaw,"two\nlines",y\n')
    bare.write_text('"First, this?",a,b,c,d,A\nSecond?,a,b,c,d,B\n')
    assert list(read_items(str(named))) == ["Who, then?", "two\nlines"]
    assert list(read_items(str(bare))) == ["First, this?", "Second?"]
    packed = tmp_path / "packed.csv.gz"
    packed.write_bytes(gzip.compress(named.read_bytes()))
    assert list(read_items(str(packed))) == ["Who, then?", "two\nlines"]
    array = tmp_path / "a.json"
    array.write_text(json.dumps([{"problem": "p"}, {"prompt": "q", "canonical_solution": "r"}]))
    assert list(read_items(str(array))) == ["p", "q"]
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("A licence that every program has a copy of.")
    (folder / "dataset_infos.json").write_text('{"default": {"splits": 3}}')
    (folder / "data" / "x_test.csv").write_text("question\nOne?\n")
    (folder / "data" / "y.jsonl").write_text('{"ctx": "two"}\n')
    (folder / "data" / "z.csv.gz").write_bytes(gzip.compress(b"question\nthree\n"))
    assert list(read_items(str(folder))) == ["One?", "two", "three"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "held.txt").write_text("a text")
    assert list(read_items(str(tmp_path / "texts"))) == ["a text"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"question": "one"}\n{"question": \n', r"a.jsonl line 2: not JSON"),
        ("a.jsonl", b'{"question": 7}\n', r"text is not a string"),
        ("a.jsonl", b'{"id": 7}\n', r"no text field it has: id"),
        ("a.csv", b"id,question\n1,one\n2\n", r"a.csv line 3: the question is missing"),
        ("a.csv", b"question\n\xff\xfe\n", r"not UTF-8"),
        ("a.csv", b"question\n" + b"x" * 200_000 + b"\n", r"field larger than field limit"),
        ("a.csv", b'question\n"one\ntwo\nthree\n', r"unexpected end of data"),
        ("a.jsonl.gz", b"no archive", r"a.jsonl.gz"),
        ("a.csv.gz", b"no archive", r"a.csv.gz: damaged compression"),
    ],
)
def test_a_broken_benchmark_ends_the_build(
    notes: Path, tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    """Guards an item that nobody looked for; and the place at --out stays free."""
    path = tmp_path / name
    path.write_bytes(content)
    for source in (path, tmp_path / "folder"):
        if source != path:
            source.mkdir()
            (source / name).write_bytes(content)
            if b'"id"' in content:
                continue  # in a folder: a file that holds none
        with pytest.raises(DataError, match=match):
            build_corpus([notes], tmp_path / "c", screening=Screening(decontaminate=[str(source)]))
    assert not (tmp_path / "c").exists()


def test_no_benchmark_there(notes: Path, tmp_path: Path) -> None:
    """Guards slips of the keyboard, and folders of something else."""
    (tmp_path / "empty").mkdir()
    for source, match in (("nowhere", "does not exist"), ("empty", "holds no items")):
        screening = Screening(decontaminate=[str(tmp_path / source)])
        with pytest.raises(ConfigError, match=match):
            build_corpus([notes], tmp_path / "c", screening=screening)
