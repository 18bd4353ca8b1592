"""An adapter on disk, and the weights that it and its base amount to.

What an export writes and an engine generates with is the same: the base as it was held while the
adapter was trained (its codes decoded, where it was quantised), plus `scale * B A`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from solollm import nf4_codec
from solollm.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE,
    AdapterOptions,
    adapter_pairs,
    adapter_table,
    merged,
    read_peft_config,
)
from solollm.affine_codec import dequantize, quantize
from solollm.architecture import ModelConfig
from solollm.backend import EngineOptions, HostTensor, TensorSource
from solollm.errors import ConfigError, nearest
from solollm.mlx_lm_layout import (
    MLX_LM_WEIGHTS,
    is_mlx_lm,
    peft_name,
    read_mlx_lm_config,
    transposed,
)
from solollm.strictfile import read_table, refused
from solollm.tensorfile import FLOATS, TensorFile, is_finite

_AFFINE_GROUP = 64


class Factors(NamedTuple):
    """An adapter's content, float32 by PEFT's names. `num_added`: matrices that mlx-lm left alone
    and whose factors here, with a product of zero, change nothing."""

    origin: Literal["peft", "mlx-lm"]
    options: AdapterOptions
    arrays: Mapping[str, np.ndarray]
    num_added: int


class AdapterFolder:
    """A folder in PEFT's layout or mlx-lm's: of a run's checkpoint, with `base.json`, or of
    anybody's."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Raises ConfigError for an adapter that is not computed here, IntegrityError for damaged
        files and for an adapter of another model."""
        config = read_table(folder / ADAPTER_CONFIG)
        base = read_table(folder / BASE) if (folder / BASE).is_file() else {}
        self.folder, self.codec = folder, str(base.get("codec", ""))
        found = read_factors(config, model, folder, locate=lambda name: folder / name)
        self.options, self.factors = found.options, found.arrays

    def array(self, name: str) -> np.ndarray:
        """One factor, float32."""
        return self.factors[name]


class HeldSource:
    """A base's tensors as they were held while adapters were trained over it."""

    def __init__(self, base: TensorSource, codec: str) -> None:
        self._base, self._codec = base, codec

    def names(self) -> Sequence[str]:
        return self._base.names()

    def read(self, name: str) -> HostTensor:
        return as_held(name, self._base.read(name), self._codec)


class MergedSource:
    """The whole model as a `TensorSource`: base and adapter in one, float32 where they meet."""

    def __init__(self, base: TensorSource, adapter: AdapterFolder, model: ModelConfig) -> None:
        self._base, self._adapter = HeldSource(base, adapter.codec), adapter
        self._pairs = {pair.base.name: pair for pair in adapter_pairs(model, adapter.options)}

    def names(self) -> Sequence[str]:
        return self._base.names()

    def read(self, name: str) -> HostTensor:
        tensor = self._base.read(name)
        if name not in self._pairs:
            return tensor
        _, a, b = self._pairs[name]
        factors = self._adapter.array(a.name), self._adapter.array(b.name)
        scale = self._adapter.options.scale
        return HostTensor.of(merged(tensor.float32(), *factors, scale))


def open_adapters(options: EngineOptions, model: ModelConfig) -> dict[str, AdapterFolder]:
    """Every adapter that an engine is to serve, by its name.

    Raises:
        ConfigError: a default that is none of them, and as `AdapterFolder`.
        IntegrityError: as `AdapterFolder`.
    """
    if options.adapter is not None and options.adapter not in options.adapters:
        raise ConfigError(
            f"the default adapter {options.adapter!r} is none of those given",
            why=nearest(options.adapter, options.adapters) or "no folder goes by that name",
        )
    return {name: AdapterFolder(folder, model) for name, folder in options.adapters.items()}


def common_codec(adapters: Iterable[AdapterFolder]) -> str:
    """The codec in which one base can be held for all of these; "" for none.

    Raises ConfigError where they were trained over bases that were held differently.
    """
    codecs = {adapter.codec: adapter.folder for adapter in adapters}
    if len(codecs) > 1:
        held = ", ".join(f"{folder} over {codec or 'no codec'}" for codec, folder in codecs.items())
        raise ConfigError(
            "one base cannot be held for all of these adapters",
            why=f"they were trained over a base in {held}",
            fix="serve them apart, or merge: solollm export CHECKPOINT --to hf --merge",
        )
    return next(iter(codecs), "")


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


def read_factors(
    config: Mapping[str, Any], model: ModelConfig, folder: Path, *, locate: Callable[[str], Path]
) -> Factors:
    """The adapter that `config`, an `adapter_config.json` of either layout, describes, proven to be
    one of `model`. `locate`: where a file of the folder really lies.

    Raises:
        ConfigError: no safetensors there, or an adapter that is not computed here.
        IntegrityError: damaged or hostile files, factors that are not this model's.
    """
    if is_mlx_lm(config):
        tensors = _read(folder, MLX_LM_WEIGHTS, locate)
        options = read_mlx_lm_config(config, list(tensors))
        arrays = {peft_name(name): transposed(factor) for name, factor in tensors.items()}
        num_added = _complete(arrays, model, options)
        found = Factors("mlx-lm", options, arrays, num_added)
    else:
        options = read_peft_config(config)
        found = Factors("peft", options, _read(folder, ADAPTER_WEIGHTS, locate), 0)
    table = {spec.name: spec.shape for spec in adapter_table(model, options)}
    _require_fitting(found.arrays, table, folder)
    return found._replace(arrays={name: found.arrays[name] for name in table})


def _complete(arrays: dict[str, np.ndarray], model: ModelConfig, options: AdapterOptions) -> int:
    """Add zero factors where both are missing; gives the number of matrices that got some."""
    added = 0
    for pair in adapter_pairs(model, options):
        if pair.a.name not in arrays and pair.b.name not in arrays:
            arrays[pair.a.name] = np.zeros(pair.a.shape, np.float32)
            arrays[pair.b.name] = np.zeros(pair.b.shape, np.float32)
            added += 1
    return added


def _read(folder: Path, name: str, locate: Callable[[str], Path]) -> dict[str, np.ndarray]:
    """Every tensor of a file, float32."""
    if not (folder / name).is_file():
        raise ConfigError(
            f"{folder} holds no {name}",
            why="an adapter's factors are read from safetensors only: a pickle can run code",
            fix="save the adapter as safetensors",
        )
    path, arrays = locate(name), {}
    with TensorFile(path, follow_links=False) as file:
        for tensor_name in file.names():
            tensor = file.read(tensor_name)
            if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
                reason = f"is {tensor.dtype} {tensor.shape}, no matrix of floating values"
                raise refused(path, f"tensor {tensor_name!r}", reason)
            if not is_finite(tensor):
                raise refused(path, f"tensor {tensor_name!r}", "holds NaN or infinity")
            arrays[tensor_name] = tensor.float32()
    return arrays


def _require_fitting(
    arrays: Mapping[str, np.ndarray], table: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    fix = "use the base that it was trained on"
    odd = sorted(set(arrays) ^ set(table))
    if odd:
        what = "is missing" if odd[0] in table else "belongs to no adapted matrix of this base"
        raise refused(folder, f"tensor {odd[0]!r}", what, fix=fix)
    for name, shape in table.items():
        if arrays[name].shape != shape:
            reason = f"has shape {arrays[name].shape}, this base and rank need {shape}"
            raise refused(folder, f"tensor {name!r}", reason, fix=fix)
