"""The toy data set of the GRPO recipe: in GSM8K's format, right, and without its own test in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from solollm.evaluation.local_data import Problem, read_gsm8k
from solollm.evaluation.tuning_data import sum_example, tuning_data
from solollm.finetune.rewards import gsm8k

_TOOL = Path(__file__).resolve().parents[2] / "tools" / "one_step_sums.py"


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Problem]]:
    folder = tmp_path_factory.mktemp("sums")
    command = [sys.executable, str(_TOOL), str(folder), "--train", "3000"]
    subprocess.run(command, check=True, capture_output=True)
    return {name: read_gsm8k(folder, name) for name in ("train", "test")}


def _numbers(problem: Problem) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+|(?<= )[+-](?= )", problem.answer))[:3]


def test_no_sum_of_the_test_is_trained_on(splits: dict[str, list[Problem]]) -> None:
    """A score on sums that were learnt by heart."""
    trained, asked = ({_numbers(p) for p in splits[name]} for name in ("train", "test"))
    assert len(asked) > 300
    assert not trained & asked


def test_every_answer_is_right_and_rewarded(splits: dict[str, list[Problem]]) -> None:
    """A wrong answer key, which GRPO would teach."""
    for problem in splits["train"]:
        a, sign, b = _numbers(problem)
        result = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert problem.answer.endswith(f"#### {result}")
        assert gsm8k(sum_example(problem).answer, problem.answer) == 1


def test_few_questions_are_taken_for_leaks(splits: dict[str, list[Problem]]) -> None:
    """Questions so long that 13 words of the frame around two numbers count as a copied test."""
    made = tuning_data([], splits["train"], tests=[p.question for p in splits["test"]])
    assert made.leaked["gsm8k"] == 0
