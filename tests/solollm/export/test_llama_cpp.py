"""Exported files in the real llama.cpp: the same ids for every text, the same probabilities.

`python3 tools/check.py --with-llama-cpp` installs it (an npm package, 85 MB) and runs this file.
"""

from __future__ import annotations

import itertools
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
from solollm.tokenizer_format import LLAMA3_PATTERN, QWEN2_PATTERN
from solollm.tokenizer_training import train_tokenizer

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
PIECES = (
    "hello", " world", " 42", "123", "1234567", " 3.14", "don't", "we'll", "I'M", "IT'S", "(see",
    "_name", "self.x", "...", "?!\n", "\n", "\n\n", " \n  ", "\t\tif", "    return", "  ", "A1b2",
    "x=1;\r\n", "日本", "naïve", "$100", "#tag", "e\u0301", "¿qué?", "a  b", "\u00a0c", "🙂👍",
    "٣٤", "½",
)  # fmt: skip
PATTERNS = {"llama-bpe": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN, "gpt-2": None}
MODEL = ModelConfig(
    vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
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


def random_texts(count: int, *, seed: int) -> list[str]:
    """Of pieces that each way of splitting takes apart in its own way, and of letters of several
    alphabets."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        pieces = list(rng.choice(PIECES, size=rng.integers(1, 9)))
        letters = ALPHABETS[rng.integers(len(ALPHABETS))]
        pieces.append("".join(rng.choice(list(letters), size=rng.integers(1, 12))))
        rng.shuffle(pieces)
        texts.append("".join(pieces))
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


def test_the_special_tokens(
    save_telling: SaveTelling, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Which token begins a text, which end it; and none of them is read out of a text, or users
    could forge roles."""
    export_model(save_telling(tmp_path, MODEL), tmp_path / "out", target="gguf", bits=8)
    texts = [f"a{token}b" for token in small_tokenizer.special_tokens]
    found = ask(tmp_path / "out" / "out.gguf", texts=texts, ids=[1, 2])
    assert found["tokens"] == [small_tokenizer.encode(text) for text in texts]
    assert found["special"] == {
        "bos": small_tokenizer.bos_id, "eos": small_tokenizer.eos_id,
        "eot": small_tokenizer.end_id, "begins": True,
    }  # fmt: skip


@pytest.mark.parametrize("way", ["own", "llama-bpe", "qwen2", "gpt-2"])
def test_texts_get_the_same_ids(way: str, save_telling: SaveTelling, tmp_path: Path) -> None:
    """A vocabulary under the name of another way of splitting is off by a token here and there.
    Imported models split as Llama 3, Qwen or GPT-2 did."""
    export_model(save_telling(tmp_path, MODEL), tmp_path / "plain", target="hf")
    taught, asked = random_texts(4_000, seed=1), random_texts(2_000, seed=2)
    files = foreign_files(PATTERNS[way], taught) if way in PATTERNS else None
    if files is None:
        files = train_tokenizer(taught, MODEL.vocab_size).files()
    for name, content in files.items():
        (tmp_path / "plain" / name).write_bytes(content)
    export_model(tmp_path / "plain", tmp_path / "out", target="gguf")
    tokenizer = Tokenizer.load(tmp_path / "plain")
    found = ask(tmp_path / "out" / "out.gguf", texts=asked, ids=[1, 2])
    for text, ids in zip(asked, found["tokens"], strict=True):
        assert ids == tokenizer.encode(text), repr(text)


def test_ways_of_splitting_can_be_told_apart(tmp_path: Path) -> None:
    """The test above could pass under any name, if its texts did not show how they are split."""
    taught, asked = random_texts(4_000, seed=1), random_texts(2_000, seed=2)
    found = {}
    for way, pattern in PATTERNS.items():
        folder = tmp_path / way
        folder.mkdir()
        for name, content in foreign_files(pattern, taught).items():
            (folder / name).write_bytes(content)
        plain = json.loads((folder / "tokenizer.json").read_text())
        # The same vocabulary, split in each of the ways.
        plain["model"] = found["model"] if found else plain["model"]
        found.setdefault("model", plain["model"])
        (folder / "tokenizer.json").write_text(json.dumps(plain))
        found[way] = Tokenizer.load(folder).encode_batch(asked)
    for way, other in itertools.combinations(PATTERNS, 2):
        differ = sum(
            not np.array_equal(a, b) for a, b in zip(found[way], found[other], strict=True)
        )
        assert differ > 100, (way, other)


def foreign_files(pattern: str | None, texts: list[str]) -> dict[str, bytes]:
    """A byte-level BPE tokenizer that splits by `pattern`; None: as GPT-2."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Plain

    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    plain = Plain(models.BPE())
    plain.decoder = decoders.ByteLevel()
    plain.pre_tokenizer = letters
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        plain.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL.vocab_size, special_tokens=["<|begin|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    plain.train_from_iterator(texts, trainer)
    config = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
    return {
        "tokenizer.json": plain.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "chat_template.jinja": b"{{ messages[0]['content'] }}",
    }
