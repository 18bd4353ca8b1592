"""The engine beside lm-eval's own `hf` model, on the same checkpoint and the same questions.

A few items here; `tools/compare_lm_eval.py` does 200 of each on a checkpoint that was tuned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import EngineOptions, HostTensor
from solollm.checkpoint import save_checkpoint
from solollm.completion import TextModel, open_model
from solollm.evaluation.harness import Benchmark, HarnessOptions, evaluate_tasks, load_tasks
from solollm.testing.snapshots import ArraySnapshot, state_at
from solollm.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'solollm[eval]'")
pytest.importorskip("accelerate", reason="lm-eval's `hf` model needs accelerate")

LOGPROB_TOLERANCE = 1e-4  # nats, absolute, of a sum over the continuation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """512 positions, so that prompts of five and eight examples must be cut. The head's padding
    rows are zero: our engine never generates their ids, and `hf` must not either."""
    model = ModelConfig(
        vocab_size=small_tokenizer.padded_vocab_size, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    snapshot = ArraySnapshot(model)
    for spec in parameter_table(model):
        values = rng.standard_normal(spec.shape, np.float32) * np.float32(0.15)
        values += np.float32(len(spec.shape) == 1)
        if spec.name == "lm_head.weight":
            values[small_tokenizer.vocab_size :] = 0
        snapshot.weights[spec.name] = HostTensor.of(values)
    return save_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), model=model, snapshot=snapshot, state=state_at(10),
        tokenizer_files=small_tokenizer.files(), token_ids=small_tokenizer.token_ids,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> TextModel:
    return open_model(checkpoint, backend="torch", options=EngineOptions(max_batch_size=4))


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        yield HFLM(pretrained=str(checkpoint), dtype="float32", batch_size=3, device="cpu")


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """Two subjects of the real MMLU: making all 57 takes longer than asking a few items."""
    folder = tmp_path_factory.mktemp("mmlu")
    for split in ("dev", "test"):
        (folder / split).mkdir()
        for subject in ("anatomy", "high_school_world_history"):
            name = f"{split}/{subject}_{split}.csv"
            (folder / name).write_bytes((shared_data / "mmlu" / name).read_bytes())
    return folder


def _both(ours: TextModel, theirs: Any, benchmark: Benchmark, **options: Any) -> list[list[Any]]:
    """Our items and theirs, in one order."""
    from solollm.evaluation.harness_model import EngineLM

    asked = HarnessOptions(**options)
    logs = []
    for model in (EngineLM(ours), theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = evaluate_tasks(model, load_tasks([benchmark]), asked)
        logs.append(
            [item for task in sorted(result["samples"]) for item in result["samples"][task]]
        )
    return logs


def test_mmlu_is_scored_as_hf_scores_it(ours: TextModel, theirs: Any, mmlu: Path) -> None:
    """Another token at the border of prompt and answer, a cut at another place, a missing bos."""
    mine, hf = _both(ours, theirs, Benchmark("mmlu", mmlu), limit=4)
    assert [item["prompt_hash"] for item in mine] == [item["prompt_hash"] for item in hf]
    logprobs = [
        np.array([[value for value, _ in item["filtered_resps"]] for item in log])
        for log in (mine, hf)
    ]
    np.testing.assert_allclose(logprobs[0], logprobs[1], atol=LOGPROB_TOLERANCE, rtol=0)
    greedy = [[flag for item in log for _, flag in item["filtered_resps"]] for log in (mine, hf)]
    assert greedy[0] == greedy[1]
    assert [item["acc"] for item in mine] == [item["acc"] for item in hf]


def test_gsm8k_is_answered_as_hf_answers_it(
    ours: TextModel, theirs: Any, shared_data: Path
) -> None:
    """A generation that ends elsewhere, begins behind another cut, or keeps its stop text."""
    mine, hf = _both(ours, theirs, Benchmark("gsm8k_cot", shared_data / "gsm8k"), limit=3)
    assert [item["resps"] for item in mine] == [item["resps"] for item in hf]
    assert any(item["resps"][0][0].strip() for item in mine)


def test_chat_prompts_are_those_of_hf(ours: TextModel, theirs: Any, mmlu: Path) -> None:
    """Special tokens of the template read as text, or bos put before them twice."""
    benchmark = Benchmark("mmlu", mmlu)
    mine, hf = _both(ours, theirs, benchmark, limit=2, chat_template=True, system="Be brief.")
    assert mine[0]["arguments"] == hf[0]["arguments"]
    assert mine[0]["arguments"][0][0].startswith("<|bos|><|system|>Be brief.")
    logprobs = [[v for item in log for v, _ in item["filtered_resps"]] for log in (mine, hf)]
    np.testing.assert_allclose(logprobs[0], logprobs[1], atol=LOGPROB_TOLERANCE, rtol=0)


def test_rolling_scores_and_stop_texts_are_those_of_hf(ours: TextModel, theirs: Any) -> None:
    """Windows that overlap, a first token without a prefix, a stop text inside a longer token."""
    from lm_eval.api.instance import Instance

    from solollm.evaluation.harness_model import EngineLM

    mine = EngineLM(ours)
    texts = ["def number_3():\n    value = 3\n" * 60, "x", "caf\u00e9 \u65e5\u672c <|end|> 12"]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    np.testing.assert_allclose(
        mine.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling),
        rtol=1e-6, atol=LOGPROB_TOLERANCE,
    )  # fmt: skip
    pairs = [Instance("loglikelihood", {}, pair, 0) for pair in [("", "def"), ("def ", " x\n")]]
    scores = [[value for value, _ in model.loglikelihood(pairs)] for model in (mine, theirs)]
    np.testing.assert_allclose(scores[0], scores[1], atol=LOGPROB_TOLERANCE, rtol=0)
    whole = theirs.generate_until(
        [Instance("generate_until", {}, ("def", {"until": [], "max_gen_toks": 40}), 0)]
    )[0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    settings = {"until": [stop], "max_gen_toks": 40, "do_sample": False}
    request = [Instance("generate_until", {}, ("def", settings), 0)]
    assert mine.generate_until(request) == theirs.generate_until(request)
    assert mine.generate_until(request) == [whole[: whole.index(stop)]]
