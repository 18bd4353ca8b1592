"""A tokenizer as llama.cpp's metadata: every token with its kind, the merges, the way of splitting.

llama.cpp splits texts by rules of a closed list that it knows by name. SoloLLM's own way is on it
(`smollm`), so that a vocabulary of one's own gives the same ids there. What is not on it is
refused: another name would give other ids, and nothing would say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solollm.errors import ConfigError
from solollm.gguf_file import Value
from solollm.strictfile import parse_json
from solollm.tokenizer import CONFIG, TOKENIZER, Tokenizer
from solollm.tokenizer_format import LLAMA3_PATTERN, QWEN2_PATTERN, read_format

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_SPLITS = {LLAMA3_PATTERN: "llama-bpe", QWEN2_PATTERN: "qwen2"}


def vocabulary_metadata(tokenizer: Tokenizer, num_rows: int) -> dict[str, Value]:
    """The keys `tokenizer.*`, for an embedding of `num_rows`.

    Raises:
        ConfigError: llama.cpp has no name for how this tokenizer splits texts.
    """
    files = tokenizer.files()
    content = parse_json(files[TOKENIZER], Path(TOKENIZER))
    tokens, kinds = _tokens(files[TOKENIZER], num_rows)
    pairs = content["model"]["merges"]
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _split_name(content),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [p if isinstance(p, str) else " ".join(p) for p in pairs],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": _begins_with_bos(files[CONFIG]),
        "tokenizer.ggml.add_eos_token": False,
    }
    if tokenizer.end_id != tokenizer.eos_id:
        metadata["tokenizer.ggml.eot_token_id"] = tokenizer.end_id
    if tokenizer.has_chat_template:
        metadata["tokenizer.chat_template"] = plain_template(tokenizer.chat_template.source)
    return metadata


def plain_template(source: str) -> str:
    """A chat template without `{% generation %}`, which not every renderer knows; its marks become
    conditions that always hold, because they may trim the blanks around them."""
    opened = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", opened)


def _tokens(content: bytes, num_rows: int) -> tuple[list[str], list[int]]:
    """The text and kind of every row; those above the vocabulary, and gaps in it, are unused."""
    layout = read_format(content, Path(TOKENIZER))
    tokens, kinds = [f"[PAD{row}]" for row in range(num_rows)], [_UNUSED] * num_rows
    for token, row in layout.vocabulary.items():
        tokens[row], kinds[row] = token, _NORMAL
    for token, row in layout.added.items():
        tokens[row] = token
        kinds[row] = _CONTROL if token in layout.special else _USER_DEFINED
    return tokens, kinds


def _split_name(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits texts."""
    pre_tokenizer = content["pre_tokenizer"]
    is_list = pre_tokenizer["type"] == "Sequence"
    *before, last = pre_tokenizer["pretokenizers"] if is_list else [pre_tokenizer]
    name = None
    if not last.get("add_prefix_space"):
        name = _name_of(before, splits_itself=bool(last.get("use_regex", True)))
    # A whole word of the vocabulary without its merges: there only Llama 3's way has it.
    if name is None or (content["model"].get("ignore_merges") and name != "llama-bpe"):
        raise ConfigError(
            "this tokenizer splits texts in a way that llama.cpp has no name for",
            why="under another name it would give other ids for the same text",
            fix="export --to hf; vLLM and transformers read the tokenizer itself",
        )
    return name


def _name_of(before: list[Mapping[str, Any]], *, splits_itself: bool) -> str | None:
    """What comes before byte level letters; `splits_itself`: they bring GPT-2's expression."""
    if not before and splits_itself:
        return "gpt-2"
    if len(before) != 1:
        return None
    (part,) = before
    if part["type"] == "Digits" and part.get("individual_digits") and splits_itself:
        return "smollm"
    if part["type"] == "Split" and part.get("behavior") == "Isolated" and not splits_itself:
        return None if part.get("invert") else _SPLITS.get(part["pattern"]["Regex"])
    return None


def _begins_with_bos(config: bytes) -> bool:
    """Whether a text begins with the first special token. Where the files do not say, it does if
    they name one."""
    table = parse_json(config, Path(CONFIG))
    return bool(table.get("add_bos_token", table.get("bos_token") is not None))
