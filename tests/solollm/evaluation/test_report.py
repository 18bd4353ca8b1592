"""`solollm eval` on a tiny checkpoint: bits per byte, the stored file, the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from solollm.architecture import ModelConfig
from solollm.backend import Request
from solollm.cli import main
from solollm.completion import open_model
from solollm.config import load_config
from solollm.errors import ConfigError
from solollm.evaluation.held_out_text import score_text
from solollm.evaluation.quoted import QUOTED_ROWS
from solollm.evaluation.report import EvalOptions, evaluate, headline, save_evaluation
from solollm.generation import generate
from solollm.run_paths import with_paths_from
from solollm.runs import Run
from solollm.tokenizer import Tokenizer

pytest.importorskip("torch")
TEXTS = ["def number_3():\n    value = 3\n" * 9, "café 日本\n", "x"]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    save_telling: Callable[[Path, ModelConfig], Path],
    small_tokenizer: Tokenizer,
    small_corpus: Path,
) -> Path:
    """A run over the small corpus, with one checkpoint of 64 positions."""
    path = tmp_path_factory.mktemp("runs") / "first"
    config = load_config(overrides=[f"data.corpus={small_corpus}"])
    Run.create(path, with_paths_from(config, path))
    model = ModelConfig(
        vocab_size=small_tokenizer.padded_vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=64,
    )  # fmt: skip
    save_telling(path / "checkpoints", model)
    return path


def test_bits_per_byte_count_every_byte_and_token_once(run: Path) -> None:
    """A window's border scored twice or not at all, eos forgotten, characters taken for bytes."""
    model = open_model(run, backend="torch")
    score = score_text(model, TEXTS, name="three")
    nll, tokens = 0.0, 0
    for text in TEXTS:
        tokenizer = model.tokenizer
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        tokens += len(ids) - 1
        for start in range(0, len(ids) - 1, 64):
            window = Request(ids[start : start + 65], 0, score_prompt=True)
            scores = generate(model.engine, [window])[0].prompt_scores
            assert scores is not None
            nll -= float(scores.logprobs.sum())
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (score.num_bytes, score.num_tokens, score.num_documents) == (num_bytes, tokens, 3)
    assert score.bits_per_byte == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-5)
    assert score.interval is not None
    assert score.interval[0] < score.bits_per_byte < score.interval[1]


def test_a_text_is_cut_at_the_bytes_that_were_asked(run: Path) -> None:
    """A book of one document read whole, or cut inside a character."""
    model = open_model(run, backend="torch")
    score = score_text(model, ["é" * 50, "more"], name="cut", max_bytes=33)
    assert (score.num_bytes, score.num_documents, score.is_whole) == (32, 1, False)
    assert score.interval is None


def test_a_run_is_measured_on_what_its_corpus_held_out_and_stored_in_it(run: Path) -> None:
    """The training split scored; a result without what it was measured with, or written over."""
    evaluation = evaluate(run, EvalOptions(backend="torch"))
    assert [score.num_documents for score in evaluation.texts] == [10]
    path = save_evaluation(evaluation)
    assert path.parent == run / "evaluations"
    stored = json.loads(path.read_text())
    assert stored["texts"][0]["bits_per_byte"] == evaluation.texts[0].bits_per_byte
    assert stored["model"]["weights_digest"] != stored["model"]["tokenizer_sha256"]
    assert stored["backend"]["name"] == "torch"
    assert "torch" in stored["backend"]["versions"]
    assert str(run) not in path.read_text()
    assert "asked for" in evaluation.notes[-1]
    assert "asked for" not in evaluate(run, EvalOptions(latency=False)).notes[-1]


def test_a_checkpoint_without_a_run_needs_to_be_told_what_to_measure(
    tmp_path: Path, run: Path
) -> None:
    """A traceback about a missing corpus."""
    loose = tmp_path / "model"
    loose.symlink_to(next((run / "checkpoints").iterdir()), target_is_directory=True)
    with pytest.raises(ConfigError, match="nothing to measure"):
        evaluate(loose, EvalOptions(backend="torch"))
    with pytest.raises(ConfigError, match="does not exist"):
        evaluate(loose, EvalOptions(backend="torch", texts=(tmp_path / "none.txt",)))


def test_the_command_prints_json_and_measures_speed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress on standard output, or a document that is no JSON."""
    text = tmp_path / "text.txt"
    text.write_text("value = 3\n" * 10)
    arguments = ["eval", str(run), "--text", str(text), "--latency", "--no-save", "--json"]
    assert main([*arguments, "--backend", "torch", "--batch-size", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["texts"][0]["num_bytes"] == 100
    assert [speed["batch_size"] for speed in document["latency"]["speeds"]] == [1, 2]
    assert document["latency"]["copy_bytes_per_second"] > 0
    assert document["stored"] is None


def test_only_the_published_shots_stand_beside_published_scores() -> None:
    """A 0-shot score, or the flexible filter's, shown in the column of the quoted one."""

    def score(benchmark: str, metric: str, shots: int) -> dict[str, object]:
        return {
            "benchmark": benchmark, "metric": metric, "num_shots": shots, "value": 0.385,
            "is_whole": shots == 8, "num_items": 200,
        }  # fmt: skip

    scores = [
        score("mmlu", "acc", 5),
        score("gsm8k_cot", "exact_match,flexible-extract", 8),
        score("gsm8k_cot", "exact_match,strict-match", 8),
    ]
    found = headline({"benchmarks": {"scores": scores}})
    assert found == {"mmlu": "38.5 (200 items)", "gsm8k_cot": "38.5"}
    assert headline({"benchmarks": {"scores": [score("mmlu", "acc", 0)]}}) == {}
    assert [row.mmlu_5_shot for row in QUOTED_ROWS[:4]] == [70.0, 31.2, 38.5, 42.1]
