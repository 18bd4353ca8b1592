"""Benchmarks through lm-eval on engines whose scores are known beforehand, and beside `hf`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from solollm.architecture import ModelConfig
from solollm.backend import EngineOptions
from solollm.completion import TextModel
from solollm.data.benchmark_items import item_text
from solollm.errors import ConfigError
from solollm.evaluation.harness import (
    Benchmark,
    HarnessOptions,
    HarnessResult,
    Score,
    confidence_interval,
    require_lm_eval,
    run_benchmarks,
)
from solollm.evaluation.local_data import LETTERS
from solollm.testing.scripted import ScriptedEngine
from solollm.tokenizer import Tokenizer

WIDE = ModelConfig(
    vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=8192,
)  # fmt: skip
SUBJECTS = ("anatomy", "virology")


@pytest.fixture(autouse=True)
def _lm_eval_here() -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'solollm[eval]'")


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A small MMLU of 2 x 30 questions without sense, and the answer to each."""
    folder = tmp_path_factory.mktemp("mmlu")
    generator = random.Random(5)
    answers: dict[str, int] = {}
    for split, count in (("dev", 5), ("test", 30)):
        for subject in SUBJECTS:
            rows = []
            for number in range(count):
                question, answer = f"{subject} {split} {number}?", generator.randrange(4)
                answers[question] = answer
                rows.append(f"{question},one,two,three,four,{LETTERS[answer]}")
            path = folder / split / f"{subject}_{split}.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(rows) + "\n")
    return folder, answers


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Twelve sums, and the number that answers each."""
    path = tmp_path_factory.mktemp("gsm8k") / "test.jsonl"
    answers = {f"What is {n} and {n}?": f"{2 * n}" for n in range(500, 512)}
    rows = [{"question": q, "answer": f"It is {a}.\n#### {a}"} for q, a in answers.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, answers


@pytest.fixture
def scripted(tmp_path: Path, small_tokenizer: Tokenizer) -> Callable[..., TextModel]:
    """A model whose engine is written down in terms of text."""

    def make(
        score: Callable[[str, str], float] = lambda context, last: 0.0,
        reply: Callable[[str], str] = lambda context: "",
    ) -> TextModel:
        def score_ids(ids: Sequence[int]) -> float:
            return score(small_tokenizer.decode(ids[:-1]), small_tokenizer.decode(ids[-1:]))

        def reply_ids(ids: Sequence[int]) -> list[int]:
            text = reply(small_tokenizer.decode(ids))
            return [*small_tokenizer.encode(text), small_tokenizer.eos_id]

        options = EngineOptions(vocab_size=small_tokenizer.vocab_size)
        engine = ScriptedEngine(WIDE, options, score_ids, reply_ids)
        return TextModel(engine, small_tokenizer, tmp_path, False, small_tokenizer.stop_ids)

    return make


def _score(result: HarnessResult, metric: str) -> Score:
    return next(score for score in result.scores if score.metric == metric)


def _last_question(context: str) -> str:
    """The question that an MMLU prompt ends in."""
    return context.rstrip().removesuffix("Answer:").split("\nA. ")[-2].split("\n")[-1]


def test_an_oracle_scores_100_percent(
    scripted: Callable[..., TextModel],
    mmlu: tuple[Path, dict[str, int]],
    gsm8k: tuple[Path, dict[str, str]],
) -> None:
    """A harness that asks another question than it grades, or grades another answer."""
    folder, letters = mmlu
    path, numbers = gsm8k

    def knows(context: str, last: str) -> float:
        is_right = last.strip() == LETTERS[letters[_last_question(context)]]
        return -0.1 if is_right else -2.0

    def solves(context: str) -> str:
        question = context.rsplit("Q: ", 1)[1].split("\n")[0]
        return f" Add them. The answer is {numbers[question]}.\n\nQ: What next? The answer is 0."

    model = scripted(knows, solves)
    result = run_benchmarks(model, [Benchmark("mmlu", folder), Benchmark("gsm8k_cot", path)])
    choice, strict = _score(result, "acc"), _score(result, "exact_match,strict-match")
    assert (choice.value, choice.num_items, choice.num_shots, choice.is_whole) == (1, 60, 5, True)
    assert (strict.value, strict.num_items, strict.num_shots, strict.version) == (1, 12, 8, "3.0")
    assert strict.interval == pytest.approx((0.7575, 1.0), abs=1e-4)  # Wilson, 12 of 12
    assert set(choice.parts) == {f"mmlu_{subject}" for subject in SUBJECTS}
    asked = {name: {item_text(row) for row in rows} for name, rows in result.items.items()}
    tested = {question for question in letters if " test " in question}
    assert asked == {"mmlu": tested, "gsm8k_cot": set(numbers)}
    assert {name: len(rows) for name, rows in result.items.items()} == {"mmlu": 60, "gsm8k_cot": 12}


@pytest.mark.parametrize("guess", ["the same for all", "at random"])
def test_a_model_that_knows_nothing_scores_chance(
    scripted: Callable[..., TextModel], mmlu: tuple[Path, dict[str, int]], guess: str
) -> None:
    """An answer that leaks into the prompt, or a choice that is graded by its place."""
    generator = random.Random(0)
    spread = 0.0 if guess == "the same for all" else 1.0
    model = scripted(lambda context, last: -1.4 - spread * generator.random())
    score = _score(run_benchmarks(model, [Benchmark("mmlu", mmlu[0])]), "acc")
    assert score.interval[0] < 0.25 < score.interval[1]
    assert 0 < score.value < 1


def test_the_prompt_holds_the_dev_questions_and_never_the_answer(
    scripted: Callable[..., TextModel], mmlu: tuple[Path, dict[str, int]]
) -> None:
    """Shots drawn from the test split, or in another order or number than MMLU's five."""
    result = run_benchmarks(scripted(), [Benchmark("mmlu", mmlu[0])], HarnessOptions(limit=3))
    assert {task: len(items) for task, items in result.samples.items()} == {
        "mmlu_anatomy": 2, "mmlu_virology": 1,
    }  # fmt: skip
    prompt = result.samples["mmlu_virology"][0]["arguments"][0][0]
    shown = [line for line in prompt.split("\n") if line.endswith("?")]
    assert shown == [*(f"virology dev {n}?" for n in range(5)), "virology test 0?"]
    assert prompt.startswith("The following are multiple choice questions (with answers) about")
    assert prompt.endswith("\nAnswer:")
    assert not _score(result, "acc").is_whole


def test_lm_eval_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback of ModuleNotFoundError instead of the command that mends it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'solollm\[eval\]'"):
        require_lm_eval()


def test_an_unknown_version_of_lm_eval_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that a later lm-eval changed, taken for the published one."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.0")
    with pytest.raises(ConfigError, match=r"0\.5\.0 is installed"):
        require_lm_eval()


def test_intervals_are_wilson_and_normal() -> None:
    """An interval without width at 0 of n."""
    low, high = confidence_interval([0.0] * 10)
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(0.2775, abs=1e-4)
    assert confidence_interval([0.0, 1.0] * 5) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert confidence_interval([1.0, 2.0, 3.0]) == pytest.approx((0.8684, 3.1316), abs=1e-4)
