"""Benchmarks from local copies, in the formats they are published in.

MMLU: the original CSV without a header (question, four choices, a letter), CSV with the columns
question, choice0..choice3, answer, and Hugging Face's `cais/mmlu` (question, subject, choices,
answer) as parquet or JSON lines. GSM8K: JSON lines or parquet with question and answer.

A broken row names its file and line; nothing is skipped, since a score over other items than the
published ones is another score.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from solollm.errors import ConfigError, DataError
from solollm.strictfile import read_bytes

LETTERS = "ABCD"
_SUFFIXES = (".csv", ".jsonl", ".parquet")
_MMLU_SPLITS = {"dev": "dev", "test": "test", "val": "validation", "validation": "validation",
                "auxiliary_train": "train", "train": "train"}  # fmt: skip
_SPLIT_WORD = re.compile(r"(?:^|_)(auxiliary_train|validation|train|test|dev|val)(?=$|[-_.])")


class Question(NamedTuple):
    """One multiple-choice item. `answer` is the index of the right one of the four `choices`."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int
    subject: str = ""

    def row(self) -> dict[str, Any]:
        """As a row of `cais/mmlu`."""
        return {
            "question": self.question, "subject": self.subject,
            "choices": list(self.choices), "answer": self.answer,
        }  # fmt: skip


class Problem(NamedTuple):
    """One item of GSM8K. `answer` ends in `#### N`."""

    question: str
    answer: str


def read_mmlu(path: Path, splits: Sequence[str] = ("dev", "test")) -> dict[str, list[Question]]:
    """Split ("dev", "test", "validation", "train") -> its items, by subject and file.

    `path`: a folder in any of the published layouts, or one file whose name says the split.

    Raises:
        ConfigError: nothing there that looks like MMLU, or a split is missing.
        DataError: a broken row, with its file and line.
    """
    found: dict[str, list[Question]] = {}
    for file in _files(path):
        named = _SPLIT_WORD.search(file.stem)
        split = _MMLU_SPLITS[named.group(1)] if named else _MMLU_SPLITS.get(file.parent.name)
        if split is not None and split in splits:
            subject = _SPLIT_WORD.split(file.stem)[0]
            found.setdefault(split, []).extend(_questions(file, subject or file.parent.name))
    missing = [split for split in splits if not found.get(split)]
    if missing:
        raise ConfigError(
            f"{path} holds no {' and no '.join(missing)} split of MMLU",
            why="looked for files such as dev/anatomy_dev.csv and all/test-00000-of-00001.parquet",
            fix="give the unpacked folder of the original release, or of Hugging Face's cais/mmlu",
        )
    return {
        split: sorted(items, key=lambda item: item.subject) for split, items in found.items()
    }  # stable: the order within a subject stays


def by_subject(items: Iterable[Question]) -> dict[str, list[Question]]:
    """Subject -> its items, in their order."""
    grouped: dict[str, list[Question]] = {}
    for item in items:
        grouped.setdefault(item.subject, []).append(item)
    return grouped


def read_gsm8k(path: Path, split: str = "test") -> list[Problem]:
    """The problems of a file, or of the file for `split` in a folder.

    Raises:
        ConfigError: no such file.
        DataError: a broken row, with its file and line.
    """
    files = _files(path)
    if path.is_dir():
        # cais and openai publish `main` and `socratic`, which has other answers
        files = [f for f in files if f.stem.split("-")[0] == split and "socratic" not in f.parts]
    problems = [problem for file in files for problem in _problems(file)]
    if not problems:
        raise ConfigError(
            f"{path} holds no {split} split of GSM8K",
            why=f"looked for {split}.jsonl and main/{split}-00000-of-00001.parquet",
            fix="give the file itself, or the unpacked folder of openai/gsm8k",
        )
    return problems


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist", fix="give a file or a folder of a benchmark")
    return sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)


def _questions(file: Path, subject: str) -> Iterator[Question]:
    if file.suffix == ".csv":
        yield from _csv_questions(file, subject)
        return
    for line, row in _rows(file):
        choices, answer = row.get("choices"), row.get("answer")
        if isinstance(answer, str) and answer.strip() in LETTERS:
            answer = LETTERS.index(answer.strip())
        yield _question(
            row.get("question"), choices, answer, (file, line, row.get("subject", subject))
        )


def _csv_questions(file: Path, subject: str) -> Iterator[Question]:
    reader = csv.reader(io.StringIO(_text(file), newline=""))
    header: list[str] | None = None
    for row in reader:
        if not row:
            continue
        at = (file, reader.line_num, subject)
        if header is None:
            header = row if "question" in row and "answer" in row else []
            if header:
                continue
        if header:
            named = dict(zip(header, row, strict=False))
            choices = [named.get(f"choice{n}") for n in range(4)]
            answer = named.get("answer", "")
            yield _question(named.get("question"), choices, _number(answer), at)
        else:
            yield _question(row[0], row[1:-1], _number(row[-1]), at)


def _number(answer: str | None) -> int:
    text = (answer or "").strip()
    if text.isdigit():
        return int(text)
    return LETTERS.find(text) if len(text) == 1 else -1


def _question(question: Any, choices: Any, answer: Any, at: tuple[Path, int, str]) -> Question:
    file, line, subject = at
    listed = list(choices) if isinstance(choices, list | tuple) else []
    if not isinstance(question, str) or not question.strip():
        raise _broken(file, line, "has no question")
    if len(listed) != 4 or not all(isinstance(choice, str) for choice in listed):
        raise _broken(file, line, "does not have four choices")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < 4:
        raise _broken(file, line, "names no answer from 0 to 3 or A to D")
    first, second, third, fourth = listed
    return Question(question, (first, second, third, fourth), answer, subject)


def _problems(file: Path) -> Iterator[Problem]:
    if file.suffix == ".csv":
        raise ConfigError(f"{file} is CSV", fix="GSM8K is published as JSON lines and parquet")
    for line, row in _rows(file):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not question.strip():
            raise _broken(file, line, "has no question")
        if not isinstance(answer, str) or "####" not in answer:
            raise _broken(file, line, "has no answer that ends in `#### N`")
        yield Problem(question, answer)


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line or row number from 1 on, record)."""
    if file.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ConfigError(
                f"{file} is parquet, which needs pyarrow", fix="pip install 'solollm[data]'"
            ) from error
        yield from enumerate(parquet.read_table(file).to_pylist(), 1)
        return
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _broken(file, number, f"is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise _broken(file, number, "is not a JSON object")
        yield number, record


def _text(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8", why=str(error)) from error


def _broken(file: Path, line: int, problem: str) -> DataError:
    return DataError(
        f"{file}, line {line}: the row {problem}",
        why="a score over other items than the published ones is another score",
        fix="download the file again",
    )
