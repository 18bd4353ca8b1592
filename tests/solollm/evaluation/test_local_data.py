"""Copies of benchmarks in their published formats, and broken ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from solollm.errors import ConfigError, DataError
from solollm.evaluation.local_data import Question, by_subject, read_gsm8k, read_mmlu

ITEMS = [
    Question("What is 2 + 2?\nThink.", ("3", "4", "5", "6"), 1, "anatomy"),
    Question('A "quoted, odd" one', ("a", "b, c", "", "d"), 3, "anatomy"),
    Question("Which?", ("x", "y", "z", "w"), 0, "virology"),
]


def _write_original(folder: Path, *, named: bool) -> None:
    """SUBJECT_test.csv and SUBJECT_dev.csv: without a header and with letters, or named columns."""
    for split in ("dev", "test"):
        for subject, items in by_subject(ITEMS).items():
            path = folder / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                if named:
                    writer.writerow(["question", *(f"choice{n}" for n in range(4)), "answer"])
                for item in items:
                    answer = item.answer if named else "ABCD"[item.answer]
                    writer.writerow([item.question, *item.choices, answer])


def _write_hub(folder: Path, *, parquet: bool) -> None:
    """`all/`, as `cais/mmlu` has it on the hub, or the same rows as JSON lines."""
    rows = [item.row() for item in ITEMS]
    (folder / "all").mkdir()
    for split in ("dev", "test"):
        if parquet:
            pyarrow = pytest.importorskip("pyarrow")
            from pyarrow import parquet as writer

            path = folder / "all" / f"{split}-00000-of-00001.parquet"
            writer.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "all" / f"{split}.jsonl").write_text(lines)


@pytest.mark.parametrize("layout", ["named columns", "no header", "parquet", "json lines"])
def test_every_published_format_gives_the_same_items(tmp_path: Path, layout: str) -> None:
    """A reader that takes a header for a question, a letter for a number, or splits at a comma."""
    if layout in ("parquet", "json lines"):
        _write_hub(tmp_path, parquet=layout == "parquet")
    else:
        _write_original(tmp_path, named=layout == "named columns")
    read = read_mmlu(tmp_path)
    assert read == {"dev": ITEMS, "test": ITEMS}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("Which?,a,b,c,d,E", "names no answer"),
        ("Which?,a,b,c,d,AB", "names no answer"),
        (",a,b,c,d,A", "has no question"),
        ("Which?,a,b,c,A", "does not have four choices"),
    ],
)
def test_a_broken_row_names_its_file_and_line(tmp_path: Path, row: str, problem: str) -> None:
    """A row skipped in silence: the score would be over other items than the published ones."""
    _write_original(tmp_path, named=False)
    broken = tmp_path / "test" / "anatomy_test.csv"
    with broken.open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError, match=rf"anatomy_test\.csv, line 4: .*{problem}"):
        read_mmlu(tmp_path)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    """Five shots asked of a copy without its dev questions."""
    _write_original(tmp_path, named=False)
    for path in (tmp_path / "dev").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="no dev split"):
        read_mmlu(tmp_path)


def test_gsm8k_from_a_folder_takes_the_split_that_was_asked(tmp_path: Path) -> None:
    """The training problems scored as the test."""
    for split in ("train", "test"):
        line = json.dumps({"question": split, "answer": "1 + 1 = 2\n#### 2"})
        (tmp_path / f"{split}.jsonl").write_text(line + "\n")
    assert [p.question for p in read_gsm8k(tmp_path)] == ["test"]
    assert [p.question for p in read_gsm8k(tmp_path, "train")] == ["train"]
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl, line 1: .*#### N"):
        read_gsm8k(tmp_path)


def test_the_real_copies_are_whole(shared_data: Path) -> None:
    """Items lost on the way: MMLU has 14,042 test and 285 dev questions, GSM8K 1,319 problems."""
    read = read_mmlu(shared_data / "mmlu")
    assert (len(read["test"]), len(read["dev"]), len(by_subject(read["test"]))) == (14_042, 285, 57)
    assert len(read_gsm8k(shared_data / "gsm8k")) == 1_319
