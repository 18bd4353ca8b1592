"""A foreign adapter, of PEFT or mlx-lm, as a folder in PEFT's layout that engines here load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solollm.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterOptions,
    adapter_pairs,
    adapter_table,
    peft_config,
    read_peft_config,
)
from solollm.architecture import ModelConfig
from solollm.backend import HostTensor
from solollm.errors import ConfigError
from solollm.importing.foreign_folder import ForeignFolder
from solollm.mlx_lm_layout import (
    MLX_LM_WEIGHTS,
    is_mlx_lm,
    peft_name,
    read_mlx_lm_config,
    transposed,
)
from solollm.model_folder import CONFIG, read_model, read_table, require_free, write_folder
from solollm.strictfile import encode_json, refused
from solollm.tensorfile import TensorFile, is_finite


@dataclass(frozen=True)
class AdapterReport:
    """What was made of an adapter. `origin`: "peft" or "mlx-lm"."""

    out: Path
    origin: str
    options: AdapterOptions
    num_parameters: int
    num_bytes: int
    notes: tuple[str, ...]


class _Found(NamedTuple):
    origin: str
    options: AdapterOptions
    factors: Mapping[str, np.ndarray]


def is_adapter_folder(source: str | Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    path = Path(source)
    return (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file()


def import_adapter(source: Path, out: Path, base: Path) -> AdapterReport:
    """Make the folder `out`, in PEFT's layout and float32, of the adapter `source` for `base`, a
    folder with the base's `config.json`.

    Layers that mlx-lm left alone get factors whose product is zero, which changes no output.

    Raises:
        ConfigError: `out` is taken, no model at `base`, an adapter that is not computed here.
        IntegrityError: damaged or hostile files, factors that are not this base's.
        StorageError: the disk is full or failing; nothing is left at `out`.
    """
    require_free(out)
    if not (base / CONFIG).is_file():
        raise ConfigError(f"{base} holds no {CONFIG}", fix="give the base model's folder: --base")
    model = read_model(read_table(base / CONFIG), base / CONFIG)
    folder = ForeignFolder(source)
    config = folder.read_table(ADAPTER_CONFIG)
    found = _of_mlx_lm(folder, config) if is_mlx_lm(config) else _of_peft(folder, config)
    table = {spec.name: spec.shape for spec in adapter_table(model, found.options)}
    factors = dict(found.factors)
    added = _completed(factors, model, found) if found.origin == "mlx-lm" else 0
    _require_fitting(factors, table, folder)
    tensors = {name: HostTensor.of(factors[name]) for name in table}
    num_bytes = write_folder(
        out,
        {ADAPTER_CONFIG: encode_json(peft_config(found.options, base_name=_base_name(config)))},
        {ADAPTER_WEIGHTS: [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]},
        tensors.items(),
    )
    note = f"{added} matrices had no factors; they got some that change nothing"
    notes = (note,) if added else ()

    num_parameters = sum(factor.size for factor in factors.values())
    return AdapterReport(out, found.origin, found.options, num_parameters, num_bytes, notes)


def _of_peft(folder: ForeignFolder, config: Mapping[str, Any]) -> _Found:
    return _Found("peft", read_peft_config(config), _read(folder, ADAPTER_WEIGHTS))


def _of_mlx_lm(folder: ForeignFolder, config: Mapping[str, Any]) -> _Found:
    tensors = _read(folder, MLX_LM_WEIGHTS)
    options = read_mlx_lm_config(config, list(tensors))
    named = {peft_name(name): transposed(factor) for name, factor in tensors.items()}
    return _Found("mlx-lm", options, named)


def _completed(factors: dict[str, np.ndarray], model: ModelConfig, found: _Found) -> int:
    """Add zero factors where both are missing; gives the number of matrices that got some."""
    added = 0
    for pair in adapter_pairs(model, found.options):
        if pair.a.name not in factors and pair.b.name not in factors:
            factors[pair.a.name] = np.zeros(pair.a.shape, np.float32)
            factors[pair.b.name] = np.zeros(pair.b.shape, np.float32)
            added += 1
    return added


def _read(folder: ForeignFolder, name: str) -> dict[str, np.ndarray]:
    """Every tensor of a file, float32."""
    if not folder.has(name):
        raise ConfigError(
            f"{folder.path} holds no {name}",
            why="an adapter's factors are read from safetensors only: a pickle can run code",
            fix="save the adapter as safetensors",
        )
    path, factors = folder.locate(name), {}
    with TensorFile(path, follow_links=False) as file:
        for tensor_name in file.names():
            tensor = file.read(tensor_name)
            if tensor.dtype not in ("F32", "F16", "BF16") or len(tensor.shape) != 2:
                reason = f"is {tensor.dtype} {tensor.shape}, no matrix of floating values"
                raise refused(path, f"tensor {tensor_name!r}", reason)
            if not is_finite(tensor):
                raise refused(path, f"tensor {tensor_name!r}", "holds NaN or infinity")
            factors[tensor_name] = tensor.float32()
    return factors


def _require_fitting(
    factors: Mapping[str, np.ndarray], table: Mapping[str, tuple[int, ...]], folder: ForeignFolder
) -> None:
    odd = sorted(set(factors) ^ set(table))
    if odd:
        what = "is missing" if odd[0] in table else "belongs to no adapted matrix of this base"
        raise refused(folder.path, f"tensor {odd[0]!r}", what)
    for name, shape in table.items():
        if factors[name].shape != shape:
            reason = f"has shape {factors[name].shape}, this base and rank need {shape}"
            raise refused(folder.path, f"tensor {name!r}", reason)


def _base_name(config: Mapping[str, Any]) -> str:
    """What the adapter says of its base, where that is a hub id and no place of one machine."""
    name = config.get("base_model_name_or_path", config.get("model"))
    is_hub_id = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/"))
    return name if is_hub_id else ""
