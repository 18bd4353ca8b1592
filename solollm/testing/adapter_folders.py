"""Adapters of random factors on disk, in both layouts, and the base that they are for: for tests of
whatever reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from solollm.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE,
    AdapterOptions,
    adapter_table,
    peft_config,
)
from solollm.architecture import ModelConfig
from solollm.backend import HostTensor
from solollm.frozen_base import BaseRecord
from solollm.mlx_lm_layout import MLX_LM_WEIGHTS, mlx_lm_config, mlx_lm_name, transposed
from solollm.strictfile import encode_json
from solollm.tensorfile import FOR_TRANSFORMERS, WEIGHTS, write_tensors
from solollm.testing.bench import lively_parameters


def random_factors(model: ModelConfig, options: AdapterOptions) -> dict[str, np.ndarray]:
    """Factors that change what the model says; the same for the same options."""
    noise = np.random.default_rng(options.rank)
    return {
        spec.name: (noise.standard_normal(spec.shape) * spec.shape[1] ** -0.5).astype(np.float32)
        for spec in adapter_table(model, options)
    }


def write_peft(
    folder: Path, model: ModelConfig, options: AdapterOptions, base: BaseRecord | None = None
) -> Path:
    """A new folder in PEFT's layout; with `base`, as a run's checkpoint has it."""
    folder.mkdir()
    (folder / ADAPTER_CONFIG).write_bytes(encode_json(peft_config(options)))
    if base is not None:
        (folder / BASE).write_bytes(encode_json(base.model_dump(mode="json")))
    write_arrays(folder / ADAPTER_WEIGHTS, random_factors(model, options))
    return folder


def write_mlx_lm(folder: Path, model: ModelConfig, options: AdapterOptions) -> Path:
    """The same adapter in mlx-lm's layout."""
    folder.mkdir()
    config = mlx_lm_config(options, model.num_hidden_layers)
    (folder / ADAPTER_CONFIG).write_bytes(encode_json(config))
    factors = random_factors(model, options)
    turned = {mlx_lm_name(name): transposed(factor) for name, factor in factors.items()}
    write_arrays(folder / MLX_LM_WEIGHTS, turned)
    return folder


def write_base(folder: Path, model: ModelConfig) -> Path:
    """`lively_parameters` as a model folder without a tokenizer; `folder` is there."""
    (folder / "config.json").write_bytes(encode_json(model.to_hf()))
    _write(folder / WEIGHTS, lively_parameters(model))
    return folder


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    _write(path, {name: HostTensor.of(array) for name, array in arrays.items()})


def _write(path: Path, tensors: Mapping[str, HostTensor]) -> None:
    specs = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write_tensors(path, specs, tensors.items(), FOR_TRANSFORMERS)
