"""The tokenizer of a foreign folder, checked as `solollm.tokenizer_format` says.

`tokenizer.json` is kept byte for byte, so that ids stay what they were. Around it, what older
folders keep elsewhere is brought together, and what names code to run is dropped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from solollm.errors import ConfigError
from solollm.importing.foreign_folder import ForeignFolder
from solollm.model_folder import CONFIG
from solollm.strictfile import encode_json
from solollm.tokenizer import CHAT_TEMPLATE, TOKENIZER, Tokenizer
from solollm.tokenizer import CONFIG as TOKENIZER_CONFIG
from solollm.tokenizer_format import read_format

_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_NAMED = ("bos_token", "eos_token", "pad_token")
_RUNS_CODE = ("auto_map",)


def read_foreign_tokenizer(folder: ForeignFolder) -> Tokenizer:
    """The folder's tokenizer.

    Raises:
        ConfigError: it has no tokenizer.json.
        IntegrityError: a tokenizer that is hostile, damaged, or of a layout not known here.
    """
    if not folder.has(TOKENIZER):
        raise ConfigError(
            f"{folder.path} holds no {TOKENIZER}",
            why="vocabularies in other files (vocab.json, tokenizer.model) are not read here",
            fix="AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes it",
        )
    content = folder.read(TOKENIZER)
    files = {TOKENIZER: content, TOKENIZER_CONFIG: encode_json(_config(folder, content))}
    if folder.has(CHAT_TEMPLATE):
        files[CHAT_TEMPLATE] = folder.read(CHAT_TEMPLATE)
    return Tokenizer(files, source=folder.path)


def _config(folder: ForeignFolder, content: bytes) -> dict[str, Any]:
    """A tokenizer_config.json with the special tokens' names, and one chat template at most."""
    config = folder.read_table(TOKENIZER_CONFIG)
    elsewhere = folder.read_table(_SPECIAL_TOKENS_MAP)
    for key in _NAMED:
        if config.get(key) is None and isinstance(elsewhere.get(key), str | dict):
            config[key] = elsewhere[key]
    if config.get("eos_token") is None:
        end = folder.read_table(CONFIG).get("eos_token_id")
        config["eos_token"] = _token_of(end, content, folder.path / TOKENIZER)
    if isinstance(config.get("chat_template"), list):
        config["chat_template"] = _default_template(config["chat_template"])
    return {key: value for key, value in config.items() if key not in _RUNS_CODE}


def _token_of(token_id: object, content: bytes, path: Path) -> str | None:
    """The text of the special token with the id by which config.json ends a text."""
    first = token_id[0] if isinstance(token_id, list) and token_id else token_id
    special = read_format(content, path).special
    return next((text for text, known in special.items() if known == first), None)


def _default_template(templates: list[Any]) -> str | None:
    """Of several named templates the one called "default"."""
    for entry in templates:
        if isinstance(entry, dict) and entry.get("name") == "default":
            template = entry.get("template")
            return template if isinstance(template, str) else None
    return None
