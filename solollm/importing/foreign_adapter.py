"""A foreign adapter, of PEFT or mlx-lm, as a folder in PEFT's layout that engines here load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solollm.adapted import read_factors
from solollm.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterOptions, peft_config
from solollm.backend import HostTensor
from solollm.errors import ConfigError
from solollm.importing.foreign_folder import ForeignFolder
from solollm.model_folder import CONFIG, read_model, require_free, write_folder
from solollm.strictfile import encode_json, read_table


@dataclass(frozen=True)
class AdapterReport:
    """What was made of an adapter. `origin`: "peft" or "mlx-lm"."""

    out: Path
    origin: str
    options: AdapterOptions
    num_parameters: int
    num_bytes: int
    notes: tuple[str, ...]


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
    found = read_factors(config, model, folder.path, locate=folder.locate)
    tensors = {name: HostTensor.of(factor) for name, factor in found.arrays.items()}
    num_bytes = write_folder(
        out,
        {ADAPTER_CONFIG: encode_json(peft_config(found.options, base_name=_base_name(config)))},
        {ADAPTER_WEIGHTS: [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]},
        tensors.items(),
    )
    note = f"{found.num_added} matrices had no factors; they got some that change nothing"
    notes = (note,) if found.num_added else ()
    num_parameters = sum(factor.size for factor in found.arrays.values())
    return AdapterReport(out, found.origin, found.options, num_parameters, num_bytes, notes)


def _base_name(config: Mapping[str, Any]) -> str:
    """What the adapter says of its base, where that is a hub id and no place of one machine."""
    name = config.get("base_model_name_or_path", config.get("model"))
    is_hub_id = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/"))
    return name if is_hub_id else ""
