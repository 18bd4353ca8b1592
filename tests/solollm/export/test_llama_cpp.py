"""Exported files in the real llama.cpp: the same ids for every text, the same probabilities.

`python3 tools/check.py --with-llama-cpp` installs it (an npm package, 85 MB) and runs this file.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solollm.architecture import ModelConfig
from solollm.export import export_model
from solollm.tokenizer import Tokenizer

pytestmark = pytest.mark.llama_cpp
LogitsOf = Callable[[str, Path, np.ndarray], np.ndarray]
SaveTelling = Callable[[Path, ModelConfig], Path]
DRIVER = Path(__file__).with_name("llama_cpp.mjs")
VARIANTS = ["theta, untied", "llama3 scaling, tied", "llama3 scaling, untied", "qk norm, tied"]
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz     '.,", "0123456789 +-.,%", "ABCXYZabc_(){}[]:;=\n\t  ",
    "äöüßéèçñ ÀÉ", "日本語テスト漢字。、", "हिन्दी भाषा", "العربية نص", "🙂🚀👨‍👩‍👧é̂ ",
    "<|bos|><|end|><|user|> ", " \t\n\r\u00a0\u2003\u200b", "½²³Ⅷ٣४ 12",
)  # fmt: skip


def ask(file: Path, *, texts: list[str], ids: list[int]) -> dict[str, Any]:
    home = os.environ.get("SOLOLLM_LLAMA_CPP", "")
    if not (Path(home) / "node_modules" / "node-llama-cpp").is_dir():
        pytest.fail("SOLOLLM_LLAMA_CPP names no installation; run tools/check.py --with-llama-cpp")
    questions, answers = file.parent / "questions.json", file.parent / "answers.json"
    questions.write_text(json.dumps({"model": str(file), "texts": texts, "ids": ids}))
    subprocess.run(["node", DRIVER, home, questions, answers], check=True, timeout=120)
    found: dict[str, Any] = json.loads(answers.read_text())
    return found


def random_texts(count: int) -> list[str]:
    """Of one alphabet or of several, of 1 to 60 characters."""
    rng = np.random.default_rng(7)
    texts = []
    for _ in range(count):
        chosen = rng.choice(len(ALPHABETS), size=rng.integers(1, 3))
        letters = "".join(ALPHABETS[i] for i in chosen)
        texts.append("".join(rng.choice(list(letters), size=rng.integers(1, 60))))
    return texts


@pytest.mark.parametrize("model_variant", VARIANTS, indirect=True)
@pytest.mark.parametrize(
    ("options", "largest"),
    [
        ({}, 2e-6),
        ({"dtype": "bfloat16"}, 8e-3),
        ({"dtype": "float16"}, 1e-3),
        ({"bits": 8}, 3e-2),
        ({"bits": 4}, 0.2),
    ],
    ids=str,
)
def test_probabilities_are_the_models(
    options: dict[str, Any], largest: float, model_variant: ModelConfig, save_telling: SaveTelling,
    logits_of: LogitsOf, tmp_path: Path,
) -> None:  # fmt: skip
    """Every setting shows in them; what it loads wrongly it says nothing of. (Of narrow weights it
    rounds what they are multiplied with, too.)"""
    source = save_telling(tmp_path, model_variant)
    export_model(source, tmp_path / "out", target="gguf", **options)
    ids = np.random.default_rng(3).integers(0, 300, (1, 60))
    found = ask(tmp_path / "out" / "out.gguf", texts=[], ids=ids[0].tolist())
    logits = logits_of("torch", source, ids)[0].astype(np.float64)
    expected = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    actual = np.zeros_like(expected)
    for place, row in enumerate(found["rows"]):
        for token, probability in row:
            actual[place, token] = probability
    np.testing.assert_allclose(actual.sum(1), 1, rtol=1e-3)
    assert np.abs(actual - expected).max() < largest


@pytest.mark.parametrize("model_variant", ["theta, untied"], indirect=True)
def test_texts_get_the_same_ids(
    model_variant: ModelConfig, save_telling: SaveTelling, small_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A vocabulary of one's own under the name of another way of splitting is off by a token here
    and there; a special token that is read out of a text lets users forge roles."""
    source = save_telling(tmp_path, model_variant)
    export_model(source, tmp_path / "out", target="gguf", bits=8)
    texts = random_texts(2_000)
    found = ask(tmp_path / "out" / "out.gguf", texts=texts, ids=[1, 2])
    for text, ids in zip(texts, found["tokens"], strict=True):
        assert ids == small_tokenizer.encode(text), repr(text)
    assert found["special"] == {
        "bos": small_tokenizer.bos_id, "eos": small_tokenizer.eos_id,
        "eot": small_tokenizer.end_id, "begins": True,
    }  # fmt: skip
