"""Training examples in the formats that benchmarks ask in: what lifts small models' scores.

Multiple choice out of MMLU's auxiliary train, validation or dev split, worked sums out of GSM8K's
train split; never out of a test split, and nothing that shares a run of words with a test question.
A score that was reached so measures the format as much as the knowledge: say so beside it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from solollm.errors import DataError
from solollm.evaluation.local_data import LETTERS, Problem, Question

Shape = Literal["messages", "prompt"]
SHARED_WORDS = 13  # a run of so many words in common is a leak (GPT-3, Brown et al. 2020, C)
_WORD = re.compile(r"\w+")
_CALCULATOR = re.compile(r"<<[^>]*>>")


@dataclass(frozen=True)
class Example:
    """`prompt` as the benchmark asks, without examples before it; `answer` as it is graded."""

    prompt: str
    answer: str
    source: str

    def row(self, shape: Shape) -> dict[str, Any]:
        """As a row of training data. `prompt`: continued text, for scoring without a template."""
        if shape == "prompt":
            return {"prompt": self.prompt, "completion": f" {self.answer}"}
        turns = (("user", self.prompt), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": text} for role, text in turns]}


@dataclass(frozen=True)
class TuningData:
    """The examples kept, and how many of each source were dropped as leaks of a test."""

    examples: tuple[Example, ...]
    leaked: Mapping[str, int]


def choice_example(item: Question) -> Example:
    """Lm-eval's prompt of one MMLU question, with the letter as its answer."""
    lines = [item.question.strip()]
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=True)]
    return Example("\n".join([*lines, "Answer:"]), LETTERS[item.answer], "mmlu")


def sum_example(problem: Problem) -> Example:
    """Lm-eval's prompt of `gsm8k_cot`, with the steps and the sentence that is graded."""
    steps, _, number = problem.answer.rpartition("####")
    worked = " ".join(_CALCULATOR.sub("", steps).split())
    answer = f"{worked} The answer is {number.strip()}."
    return Example(f"Q: {problem.question}\nA:", answer, "gsm8k")


def tuning_data(
    questions: Sequence[Question],
    problems: Sequence[Problem],
    *,
    tests: Iterable[str],
    repeats: Mapping[str, int] | None = None,
    seed: int = 0,
) -> TuningData:
    """Examples of both kinds, decontaminated and shuffled.

    `tests`: every text that must not be learnt, the tests' questions. `repeats`: how often each
    source is shown (nanochat: mmlu 3, gsm8k 4). Choices of a repeated question stand in another
    order each time, so that letters are not learnt by heart.

    Raises:
        DataError: nothing is left.
    """
    leaks = leaked_words(tests)
    times = {"mmlu": 1, "gsm8k": 1, **(repeats or {})}
    generator = random.Random(seed)
    kept: list[Example] = []
    leaked = {"mmlu": 0, "gsm8k": 0}
    for question in questions:
        if is_leak(f"{question.question} {' '.join(question.choices)}", leaks):
            leaked["mmlu"] += 1
            continue
        kept.append(choice_example(question))
        kept += [choice_example(_turned(question, generator)) for _ in range(times["mmlu"] - 1)]
    for problem in problems:
        if is_leak(problem.question, leaks):
            leaked["gsm8k"] += 1
        else:
            kept += [sum_example(problem)] * times["gsm8k"]
    if not kept:
        raise DataError("no example is left", why=f"dropped as leaks of a test: {leaked}")
    generator.shuffle(kept)
    return TuningData(tuple(kept), leaked)


def leaked_words(tests: Iterable[str]) -> set[tuple[str, ...]]:
    """Every run of `SHARED_WORDS` words of the tests; of a shorter test all its words."""
    return {run for text in tests for run in _runs(text, short=True)}


def is_leak(text: str, leaks: set[tuple[str, ...]]) -> bool:
    """Whether a text shares a run of words with a test, or is a short one's very words."""
    return any(run in leaks for run in _runs(text, short=True))


def write_examples(examples: Iterable[Example], path: Path, shape: Shape = "messages") -> None:
    """As JSON lines. Raises StorageError."""
    from solollm import durable

    durable.make_directory(path.absolute().parent)
    lines = (json.dumps(example.row(shape), ensure_ascii=False) + "\n" for example in examples)
    durable.replace_file(path, "".join(lines).encode())


def _runs(text: str, *, short: bool) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    if len(words) < SHARED_WORDS:
        if short and words:
            yield tuple(words)
        return
    for start in range(len(words) - SHARED_WORDS + 1):
        yield tuple(words[start : start + SHARED_WORDS])


def _turned(item: Question, generator: random.Random) -> Question:
    order = list(range(4))
    generator.shuffle(order)
    first, second, third, fourth = (item.choices[place] for place in order)
    return item._replace(choices=(first, second, third, fourth), answer=order.index(item.answer))
