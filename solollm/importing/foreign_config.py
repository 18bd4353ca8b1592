"""What a foreign `config.json` and `generation_config.json` say, with nothing left to defaults.

transformers and mlx-lm fill what a file leaves out differently, so that one file can be two models;
what decides logits must be spelt out here, and a head is tied where there is none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from solollm.architecture import ModelConfig
from solollm.errors import ConfigError
from solollm.importing.foreign_folder import ForeignFolder
from solollm.model_folder import CONFIG, GENERATION, read_model, token_ids
from solollm.strictfile import refused
from solollm.tokenizer import Tokenizer

_REQUIRED = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
_REQUIRED_OF_QWEN3 = ("head_dim", "num_key_value_heads")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_foreign_model(folder: ForeignFolder, tensor_names: Collection[str]) -> ModelConfig:
    """The model of a folder that holds tensors of these names.

    Raises:
        ConfigError: not computed here: another architecture, an unknown quantisation.
        IntegrityError: no config.json, or one that makes no sense or leaves something open.
    """
    path = folder.path / CONFIG
    if not folder.has(CONFIG):
        raise ConfigError(
            f"{folder.path} holds no {CONFIG}",
            why="it is no model folder in the Hugging Face layout",
            fix="give a folder that transformers or mlx-lm loads, or a hub id: owner/name",
        )
    raw = folder.read_table(CONFIG)
    _refuse_quantization(raw)
    if "tie_word_embeddings" not in raw:
        raw["tie_word_embeddings"] = not any(name.startswith("lm_head.") for name in tensor_names)
    model = read_model(raw, path)
    wanted = _REQUIRED + (_REQUIRED_OF_QWEN3 if model.qk_norm else ())
    missing = [key for key in wanted if raw.get(key) is None]
    if missing:
        raise refused(path, missing[0], "is not said, and programs differ in what they then take")
    return model


def foreign_token_ids(folder: ForeignFolder, tokenizer: Tokenizer, limit: int) -> dict[str, int]:
    """The special ids for `config.json`: the folder's own where each is one id below `limit`, the
    tokenizer's for the rest."""
    own = {key: i for key, i in token_ids(folder.read_table(CONFIG)).items() if 0 <= i < limit}
    return tokenizer.token_ids | own


def foreign_generation(folder: ForeignFolder, ids: Mapping[str, int], limit: int) -> dict[str, Any]:
    """A `generation_config.json`: what ends a generation (one id or several), and the publisher's
    sampling values."""
    given = folder.read_table(GENERATION)
    ends = given.get("eos_token_id", folder.read_table(CONFIG).get("eos_token_id"))
    listed = ends if isinstance(ends, list) else [ends]
    usable = [end for end in listed if type(end) is int and 0 <= end < limit]
    sampling = {
        key: given[key] for key in _SAMPLING if isinstance(given.get(key), bool | int | float)
    }
    own = {"eos_token_id": usable if len(usable) > 1 else usable[0]} if usable else {}
    return {**ids, **own, **sampling}


def _refuse_quantization(raw: Mapping[str, Any]) -> None:
    """MLX's affine codes are read; everything else that packs weights is not."""
    for settings in (raw.get("quantization"), raw.get("quantization_config")):
        if settings is None:
            continue
        table = settings if isinstance(settings, dict) else {"quant_method": settings}
        layers = [entry for entry in table.values() if isinstance(entry, dict)]
        methods = {str(entry.get("mode", "affine")) for entry in (table, *layers)} - {"affine"}
        if table.get("quant_method") is not None:
            methods = {str(table["quant_method"])}
        if methods:
            raise ConfigError(
                f"the weights are quantised by {min(methods)!r:.40}",
                why="mlx-lm's affine codes are the only ones that are read here",
                fix="import the model that they were made from",
            )
