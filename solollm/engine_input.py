"""What every engine checks before it computes: the folder, the options, each request.

Backends differ in how they decode, not in what they refuse.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from solollm.architecture import ModelConfig
from solollm.backend import EngineOptions, Request
from solollm.errors import ConfigError, nearest
from solollm.sampling import check_sampling


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model that a checkpoint directory describes. Raises ConfigError where there is none."""
    path = checkpoint / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{checkpoint} is not a checkpoint",
            why=f"its config.json cannot be read: {error}",
            fix="give a run folder or a checkpoint folder; `solollm runs list` shows them",
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, not a model's settings")
    return ModelConfig.from_hf(raw)


def complete_options(
    options: EngineOptions, model: ModelConfig, *, known: Sequence[str]
) -> EngineOptions:
    """The options with the model's numbers in the place of zeros.

    `known`: the `backend_options` that this engine has. Raises ConfigError for what cannot be.
    """
    limit, rows = model.max_position_embeddings, model.vocab_size
    if not 0 <= options.max_seq_len <= limit:
        raise ConfigError(
            f"max_seq_len {options.max_seq_len} is beyond the model's {limit} positions",
            fix=f"give {limit} or less (0: all of them)",
        )
    if not 0 <= options.vocab_size <= rows:
        raise ConfigError(
            f"vocab_size {options.vocab_size} is not within the model's {rows} rows",
            fix="use the tokenizer that the checkpoint was trained with",
        )
    if options.max_batch_size < 1:
        raise ConfigError(f"max_batch_size {options.max_batch_size} leaves no room for a request")
    for key in options.backend_options:
        if key not in known:
            raise ConfigError(f"unknown engine option `{key}`", why=nearest(key, known))
    return replace(
        options, max_seq_len=options.max_seq_len or limit, vocab_size=options.vocab_size or rows
    )


def checked_prompt(request: Request, options: EngineOptions) -> np.ndarray:
    """The request's prompt, int64 [n], if an engine with these completed options can run it;
    raises ConfigError if not."""
    check_sampling(request.sampling)
    if request.adapter is not None and request.adapter not in options.adapters:
        raise ConfigError(
            f"this engine holds no adapter {request.adapter!r}",
            why=nearest(request.adapter, options.adapters) or "it was opened without it",
        )
    if request.max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens {request.max_new_tokens} is negative")
    prompt = np.asarray(request.prompt_ids, np.int64)
    if prompt.ndim != 1 or not len(prompt):
        raise ConfigError("the prompt is empty", fix="begin it with the tokenizer's bos id")
    if len(prompt) > options.max_seq_len + (request.max_new_tokens == 0):
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens is too long",
            why=f"the engine holds {options.max_seq_len} positions",
            fix="shorten it: the end counts most",
        )
    if prompt.min() < 0 or prompt.max() >= options.vocab_size:
        bad = prompt[(prompt < 0) | (prompt >= options.vocab_size)][0]
        raise ConfigError(
            f"token id {bad} is outside the vocabulary of {options.vocab_size}",
            fix="use the tokenizer that belongs to the checkpoint",
        )
    return prompt
