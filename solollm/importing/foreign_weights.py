"""Foreign weights under the model's own names: codes become values, what is derived is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from solollm.affine_codec import BITS, Quantized, dequantize
from solollm.architecture import ModelConfig, parameter_table
from solollm.backend import DType, HostTensor
from solollm.rounding import common_dtype, rounded
from solollm.strictfile import refused
from solollm.tensorfile import Weights, is_finite
from solollm.tensorheader import Spec

_GROUP_SIZES = (32, 64, 128)
_DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")


class ForeignWeights:
    """A `TensorSource` of a model's canonical tensors over the files of another program.

    Attributes:
        dtype: the narrowest that holds every weight exactly; float32 where any is in codes.
        num_quantized: matrices that are codes.
        left_out: tensors that are no parameters of this model, and are known to be none.

    Raises:
        IntegrityError: a tensor that is missing, misshapen, or unknown.
    """

    def __init__(self, weights: Weights, model: ModelConfig) -> None:
        self._weights = weights
        self._home = {name: file for file in weights.files for name in file.names()}
        self._shapes = {spec.name: spec.shape for spec in parameter_table(model)}
        self._bits = {name: self._bits_of(name) for name in self._shapes if self._is_codes(name)}
        dtypes = {weights.info(name).dtype for name in self._shapes if name not in self._bits}
        self.dtype: DType = "F32" if self._bits else common_dtype(dtypes)
        self.num_quantized = len(self._bits)
        self.left_out = self._check_names(model)

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def read(self, name: str) -> HostTensor:
        """The tensor, finite; float32 where it was in codes."""
        if name not in self._bits:
            return self._weights.read(name)
        codes = self._home[name].read(name).data
        scales, biases = (self._weights.read(part).float32() for part in _parts(name))
        values = dequantize(Quantized(codes, scales, biases), bits=self._bits[name])
        tensor = HostTensor.of(values)
        if not is_finite(tensor):
            raise refused(self._path(name), f"tensor {name!r}", "its codes stand for no numbers")
        return tensor

    def specs(self, dtype: DType) -> list[Spec]:
        """Name, dtype and shape of every tensor, in order."""
        return [(name, dtype, shape) for name, shape in self._shapes.items()]

    def tensors(self, dtype: DType) -> Iterator[tuple[str, HostTensor]]:
        """Every tensor, one at a time, widened or rounded to `dtype`."""
        return ((name, rounded(name, self.read(name), dtype)) for name in self._shapes)

    def _is_codes(self, name: str) -> bool:
        scales, _ = _parts(name)
        return scales in self._home

    def _bits_of(self, name: str) -> int:
        """Bits per code, from the shapes alone: they cannot disagree with the file."""
        rows, columns = self._shapes[name] if len(self._shapes[name]) == 2 else (0, 0)
        info, tables = self._weights.info(name), [self._weights.info(p) for p in _parts(name)]
        groups = tables[0].shape[-1] if len(tables[0].shape) == 2 else 0
        bits = info.shape[-1] * 32 // columns if columns and info.shape else 0
        fits = (
            info.dtype == "U32"
            and bits in BITS
            and info.shape == (rows, columns * bits // 32)
            and groups > 0
            and columns / groups in _GROUP_SIZES
            and all(table.shape == (rows, groups) for table in tables)
        )
        if not fits:
            shapes = f"{info.dtype} {info.shape} with scales {tables[0].shape}"
            raise refused(self._path(name), f"tensor {name!r}", f"{shapes} are no affine codes")
        return bits

    def _check_names(self, model: ModelConfig) -> tuple[str, ...]:
        left_out = []
        used = {*self._shapes, *(part for name in self._bits for part in _parts(name))}
        for name in self._home:
            is_tied_head = model.tie_word_embeddings and name.startswith("lm_head.")
            if is_tied_head or _DERIVED.fullmatch(name):
                left_out.append(name)
            elif name not in used:
                raise refused(self._path(name), f"tensor {name!r}", "is not one of this model")
        for name, shape in self._shapes.items():
            found = self._weights.info(name).shape
            if name not in self._bits and found != shape:
                reason = f"has shape {found}, the model {shape}"
                raise refused(self._path(name), f"tensor {name!r}", reason)
        return tuple(left_out)

    def _path(self, name: str) -> Path:
        return self._home[name].path


def _parts(name: str) -> tuple[str, str]:
    prefix = name.removesuffix("weight")
    return f"{prefix}scales", f"{prefix}biases"
