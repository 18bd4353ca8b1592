"""Learning a vocabulary from text: byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from solollm.chat_template import TEMPLATE
from solollm.errors import ConfigError
from solollm.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_alphabet, tokenizer_config

MAX_RESERVED_TOKENS = 64


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, reserved_tokens: int | None = None
) -> Tokenizer:
    """A tokenizer whose merges are the most frequent in `texts`; equal texts give equal files.

    Args:
        vocab_size: special tokens, 256 bytes and merges together. Fewer where the texts run
            out of pairs.
        reserved_tokens: special tokens `<|reserved_0|>`... kept for later use; default: a
            thirty-second of the room for merges, at most 64.
    """
    from tokenizers import Tokenizer as PlainTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    if reserved_tokens is None:
        room = vocab_size - len(SPECIAL_TOKENS) - 256
        reserved_tokens = max(0, min(MAX_RESERVED_TOKENS, room // 32))
    special = [*SPECIAL_TOKENS, *(f"<|reserved_{n}|>" for n in range(reserved_tokens))]
    if vocab_size < len(special) + 256:
        raise ConfigError(
            f"a vocabulary of {vocab_size} has no room for {len(special)} special tokens and "
            "256 bytes",
            fix=f"ask for at least {len(special) + 256}, sensibly 1024 or more",
        )
    plain = PlainTokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(byte_alphabet().values()),
        show_progress=False,
    )
    plain.train_from_iterator(texts, trainer)
    model = json.loads(plain.to_str())["model"]
    return assemble(special, [(left, right) for left, right in model["merges"]])


def assemble(special: Sequence[str], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """The tokenizer with these special tokens and merges (in byte-level letters, in order)."""
    tokens = [*special, *sorted(byte_alphabet().values())]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(place, token) for place, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                _byte_level(),
            ],
        },
        "post_processor": None,
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(merge) for merge in merges],
        },
    }
    config = tokenizer_config(TEMPLATE, {token: place for place, token in enumerate(special)})
    return Tokenizer(
        {
            "tokenizer.json": json.dumps(content, ensure_ascii=False, indent=1).encode(),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1).encode(),
            "chat_template.jinja": TEMPLATE.encode(),
        }
    )


def _added_token(place: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": place, "content": token, **flags, "special": True}


def _byte_level() -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
