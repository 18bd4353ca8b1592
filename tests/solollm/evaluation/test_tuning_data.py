"""Training data in the benchmarks' formats: what the benchmarks ask, and nothing of their tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from solollm.errors import DataError
from solollm.evaluation.local_data import Problem, Question, read_gsm8k, read_mmlu
from solollm.evaluation.tuning_data import (
    choice_example,
    sum_example,
    tuning_data,
    write_examples,
)

QUESTION = Question("What is 2 + 2? ", ("3", "4", "5", "6"), 1, "anatomy")
PROBLEM = Problem("Tom has 2 apples and buys 3.", "He has 2+3=<<2+3=5>>5 apples.\n#### 5")
TEST = "A train leaves the town at nine and travels for three hours at forty miles per hour."


def test_examples_are_what_the_benchmarks_ask_and_grade() -> None:
    """A prompt that lm-eval never writes, or an answer that its filter does not find."""
    choice, worked = choice_example(QUESTION), sum_example(PROBLEM)
    assert choice.prompt == "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
    assert choice.row("prompt") == {"prompt": choice.prompt, "completion": " B"}
    assert worked.prompt == "Q: Tom has 2 apples and buys 3.\nA:"
    assert worked.answer == "He has 2+3=5 apples. The answer is 5."
    assert worked.row("messages")["messages"][1] == {"role": "assistant", "content": worked.answer}


def test_prompts_equal_lm_evals_to_the_letter(shared_data: Path, tmp_path: Path) -> None:
    """The format of another version of lm-eval, learnt for nothing."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'solollm[eval]'")
    from solollm.evaluation.harness import Benchmark, load_tasks

    found = load_tasks([Benchmark("gsm8k_cot", shared_data / "gsm8k")])["gsm8k_cot"][0]
    problem = read_gsm8k(shared_data / "gsm8k")[0]
    assert found.doc_to_text(problem._asdict()) == sum_example(problem).prompt
    few = tmp_path / "mmlu"
    for split in ("dev", "test"):
        (few / split).mkdir(parents=True)
        name = f"{split}/anatomy_{split}.csv"
        (few / name).write_bytes((shared_data / "mmlu" / name).read_bytes())
    task = load_tasks([Benchmark("mmlu", few)])["mmlu"][0]
    item = read_mmlu(few)["test"][0]
    assert task.doc_to_text(item.row()) == choice_example(item).prompt


def test_what_shares_thirteen_words_with_a_test_is_dropped() -> None:
    """The test learnt by heart through a training file that quotes it."""
    leak = Problem(f"Think: {TEST} How far?", "It is 120.\n#### 120")
    copied = QUESTION._replace(question=TEST.upper())
    data = tuning_data([QUESTION, copied], [PROBLEM, leak], tests=[TEST, "What is 2 + 3?"])
    assert data.leaked == {"mmlu": 1, "gsm8k": 1}
    assert {example.source for example in data.examples} == {"mmlu", "gsm8k"}
    assert not any("train leaves" in example.prompt for example in data.examples)
    with pytest.raises(DataError, match="no example is left"):
        tuning_data([copied], [leak], tests=[TEST])


def test_repeated_questions_turn_their_choices(tmp_path: Path) -> None:
    """A letter learnt for a question, instead of its answer."""
    data = tuning_data([QUESTION], [PROBLEM], tests=[], repeats={"mmlu": 20, "gsm8k": 2}, seed=1)
    choices = [example for example in data.examples if example.source == "mmlu"]
    assert (len(choices), len(data.examples)) == (20, 22)
    assert {example.answer for example in choices} == set("ABCD")
    assert all(f"{example.answer}. 4\n" in example.prompt for example in choices)
    write_examples(data.examples, tmp_path / "out" / "sft.jsonl")
    text = (tmp_path / "out" / "sft.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 22
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
