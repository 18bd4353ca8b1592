"""An imported chat model with a tokenizer of its own kind, used: ids, conversations, training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solollm.architecture import ModelConfig, parameter_table
from solollm.completion import generate_text, open_model
from solollm.config import parse_config
from solollm.data.build import build_corpus
from solollm.dialogue import ChatSession
from solollm.errors import ConfigError
from solollm.importing import import_model
from solollm.pretraining import pretrain
from solollm.tensorfile import open_weights
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_format import KNOWN_PATTERNS

TEXT = "it's 2026: naïve café,\n\n  日本語 def f(x): return x + 12345  \n<think>hm</think> "
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONVERSATION = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And 12?"},
]


def chat_tokenizer(folder: Path) -> None:
    """The files of a tokenizer as Qwen 3 has it: NFC, its own split, specials behind the rest, an
    added token that is not special, no beginning of text."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(KNOWN_PATTERNS[2]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT * 3], trainer)
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    made.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "model_max_length": 10**30, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-style folder in bf16 as transformers saves it, more rows than tokens."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("hub") / "chat-model"
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=331, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    chat_tokenizer(folder)
    generation = {"eos_token_id": [302, 300], "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def ours(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chat"
    report = import_model(theirs, folder)
    assert (report.dtype, report.vocab_size) == ("bfloat16", 305)
    return folder


def test_ids_are_those_of_the_plain_library(theirs: Path, ours: Path) -> None:
    """One id apart, and every embedding row means another token."""
    from tokenizers import Tokenizer as PlainTokenizer

    plain = PlainTokenizer.from_file(str(theirs / "tokenizer.json"))
    tokenizer = Tokenizer.load(ours)
    assert tokenizer.encode(TEXT) == plain.encode(TEXT, add_special_tokens=False).ids
    assert plain.token_to_id("<think>") in tokenizer.encode(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (ours / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()


def test_conversations_are_laid_out_as_transformers_does(theirs: Path, ours: Path) -> None:
    """The chat template is the model's own: in another layout a tuned model is lost."""
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(theirs)
    expected = reference.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert Tokenizer.load(ours).apply_chat_template(CONVERSATION) == expected["input_ids"]


def test_it_generates_and_chats(ours: Path) -> None:
    """`generate` and `chat` on the imported folder, in the model's own mode."""
    model = open_model(ours)
    assert model.is_chat
    assert model.stop_ids == {302, 300}
    assert generate_text(model, "it's", max_new_tokens=4).tokens.finish_reason in ("length", "stop")
    session = ChatSession(model, max_new_tokens=4)
    assert session.mode == "chat"
    list(session.ask("Hi"))


def test_training_goes_on_from_it(ours: Path, tmp_path: Path) -> None:
    """Its tokenizer makes the corpus, its weights start the run, its files go into the checkpoint.
    With a learning rate of next to nothing the weights must still be the imported ones."""
    (tmp_path / "text.txt").write_text(TEXT * 40)
    corpus = tmp_path / "corpus"
    build_corpus([tmp_path / "text.txt"], corpus, tokenizer=Tokenizer.load(ours))
    result = pretrain(config_for(corpus, ours), tmp_path / "run")
    assert result.step == 2
    before, after = open_weights(ours), open_weights(result.checkpoint)
    model = ModelConfig.from_hf(json.loads((ours / "config.json").read_text()))
    for spec in parameter_table(model):
        np.testing.assert_allclose(
            after.read(spec.name).data, before.read(spec.name).float32(), rtol=0, atol=1e-6
        )
    for name, content in Tokenizer.load(ours).files().items():
        assert (result.checkpoint / name).read_bytes() == content


def config_for(corpus: Path, init_from: Path) -> Any:
    return parse_config(
        {
            "data": {"corpus": str(corpus), "seq_len": 32},
            "optimizer": {"name": "adamw", "lr": 1e-9},
            "train": {"steps": 2, "batch_size": 2, "init_from": str(init_from)},
            "eval": {"every_steps": 0, "sample_tokens": 2},
        }
    )


def test_a_corpus_of_another_tokenizer_is_refused(
    ours: Path, small_corpus: Path, tmp_path: Path
) -> None:
    """The same ids would mean other tokens; training would seem to work."""
    with pytest.raises(ConfigError, match=r"ids|tokenizer"):
        pretrain(config_for(small_corpus, ours), tmp_path / "run")
