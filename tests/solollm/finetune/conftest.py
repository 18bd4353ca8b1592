"""A base that answers questions badly, and rows to tune it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from solollm.architecture import ModelConfig
from solollm.config import RunConfig
from solollm.finetune.tuning import finetune_config
from solollm.tokenizer import Tokenizer

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty questions and answers of unequal length."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {"question": f"What is number_{n}?", "answer": f"value = {n}\n" * (1 + n % 4)}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_base(
    tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer,
    save_telling: Callable[[Path, ModelConfig], Path],
) -> Callable[[int], Path]:  # fmt: skip
    """make_base(layers): a checkpoint of a small model."""

    def make(layers: int) -> Path:
        model = ModelConfig(
            vocab_size=small_tokenizer.padded_vocab_size, hidden_size=64, intermediate_size=128,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, tie_word_embeddings=True,
        )  # fmt: skip
        return save_telling(tmp_path_factory.mktemp("base"), model)

    return make


@pytest.fixture(scope="session")
def base(make_base: Callable[[int], Path]) -> Path:
    return make_base(2)


@pytest.fixture(scope="session")
def tuning(base: Path, chats: Path) -> MakeConfig:
    """tuning("finetune.method=lora", ...): a config of some steps on the chats."""

    def make(*overrides: str) -> RunConfig:
        given = [
            f"train.init_from={json.dumps(str(base))}", f"finetune.data={json.dumps([str(chats)])}",
            "train.steps=6", "data.seq_len=128", "train.batch_size=2", "eval.batches=2",
            "eval.sample_tokens=4", "log.every_steps=1",
        ]  # fmt: skip
        return finetune_config(None, [*given, *overrides])

    return make


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short questions whose chosen answer is polite, and whose rejected one is not."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"Say {n}", "chosen": f"please {n}", "rejected": f"never {n}"} for n in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dpo(base: Path, pairs: Path) -> MakeConfig:
    """dpo("train.steps=6", ...): a config of a run on the pairs."""

    def make(*overrides: str) -> RunConfig:
        return finetune_config(None, [
            f"train.init_from={json.dumps(str(base))}", f"finetune.data={json.dumps([str(pairs)])}",
            "finetune.objective=dpo", "data.seq_len=64", "train.batch_size=8", "eval.batches=2",
            "finetune.held_out_fraction=0.2", "eval.sample_tokens=2", "log.every_steps=1",
            "checkpoint.every_steps=3", "optimizer.lr=0.003", "backend_options.mlx.compile=false",
            *overrides,
        ])  # fmt: skip

    return make
