"""An adapter on disk, and the weights that it and its base amount to.

What an export writes and an engine generates with is the same: the base as it was held while the
adapter was trained (its codes decoded, where it was quantised), plus `scale * B A`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from solollm import nf4_codec
from solollm.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterOptions,
    adapter_pairs,
    adapter_table,
    merged,
    read_peft_config,
)
from solollm.affine_codec import dequantize, quantize
from solollm.architecture import ModelConfig
from solollm.backend import HostTensor, TensorSource
from solollm.errors import ConfigError, IntegrityError
from solollm.strictfile import parse_json, read_bytes, refused
from solollm.tensorfile import TensorFile

BASE = "base.json"
_AFFINE_GROUP = 64


class AdapterFolder:
    """A folder in PEFT's layout: of a run's checkpoint, with `base.json`, or of anybody's."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Raises ConfigError for an adapter that is not computed here or not of this model,
        IntegrityError for damaged files."""
        raw = _table(folder / ADAPTER_CONFIG)
        self.folder, self.options = folder, read_peft_config(raw)
        base = _table(folder / BASE) if (folder / BASE).is_file() else {}
        self.codec = str(base.get("codec", ""))
        with TensorFile(folder / ADAPTER_WEIGHTS, follow_links=False) as file:
            self.factors = _factors(file, model, self.options)

    def array(self, name: str) -> np.ndarray:
        """One factor, float32."""
        return self.factors[name]


class MergedSource:
    """The whole model as a `TensorSource`: base and adapter in one, float32 where they meet."""

    def __init__(self, base: TensorSource, adapter: AdapterFolder, model: ModelConfig) -> None:
        self._base, self._adapter = base, adapter
        self._pairs = {pair.base.name: pair for pair in adapter_pairs(model, adapter.options)}

    def names(self) -> Sequence[str]:
        return self._base.names()

    def read(self, name: str) -> HostTensor:
        tensor = as_held(name, self._base.read(name), self._adapter.codec)
        if name not in self._pairs:
            return tensor
        _, a, b = self._pairs[name]
        factors = self._adapter.array(a.name), self._adapter.array(b.name)
        scale = self._adapter.options.scale
        return HostTensor.of(merged(tensor.float32(), *factors, scale))


def as_held(name: str, tensor: HostTensor, codec: str) -> HostTensor:
    """A base's tensor as it was while an adapter was trained: its matrices through the codec."""
    if not codec or not name.endswith("_proj.weight"):
        return tensor
    if codec == "nf4":
        return HostTensor.of(nf4_codec.decoded(tensor.float32()))
    if codec != "affine4":
        raise ConfigError(f"no codec {codec[:20]!r} is known here", fix="update SoloLLM")
    if tensor.shape[1] % _AFFINE_GROUP:
        return tensor
    codes = quantize(tensor.float32(), bits=4, group_size=_AFFINE_GROUP)
    return HostTensor.of(dequantize(codes, bits=4))


def _factors(
    file: TensorFile, model: ModelConfig, options: AdapterOptions
) -> dict[str, np.ndarray]:
    """Every factor, float32, shapes checked."""
    expected = {spec.name: spec.shape for spec in adapter_table(model, options)}
    odd = sorted(set(file.names()) ^ set(expected))
    if odd:
        raise IntegrityError(
            f"{file.path} is no adapter of this model",
            why=f"{odd[0]} is {'missing' if odd[0] in expected else 'not one of its tensors'}",
            fix="use the base that it was trained on",
        )
    factors = {}
    for name, shape in expected.items():
        tensor = file.read(name)
        if tensor.shape != shape:
            raise refused(file.path, f"tensor {name!r}", f"has shape {tensor.shape}, not {shape}")
        factors[name] = tensor.float32()
        if not np.isfinite(factors[name]).all():
            raise refused(file.path, f"tensor {name!r}", "holds NaN or infinity")
    return factors


def _table(path: Path) -> dict[str, object]:
    table = parse_json(read_bytes(path), path)
    if not isinstance(table, dict):
        raise refused(path, "the JSON text", "is no table")
    return table
