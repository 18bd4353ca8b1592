"""Weights in another floating dtype: to the nearest, ties to even, in NumPy alone.

Widening is exact. What is too large for the narrower dtype is an error, never an infinity.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from solollm.backend import BITS_DTYPE, ComputeDType, DType, HostTensor
from solollm.errors import ConfigError

DTYPE_TAGS: Mapping[ComputeDType, DType] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPE_NAMES: Mapping[str, ComputeDType] = {tag: name for name, tag in DTYPE_TAGS.items()}
_CHUNK = 1 << 20  # elements converted at once: bounds the working memory


def rounded(name: str, tensor: HostTensor, dtype: DType) -> HostTensor:
    """A floating-point tensor in `dtype`; the tensor itself if it is that already.

    Raises:
        ConfigError: a value overflows; names the tensor.
    """
    if tensor.dtype == dtype:
        return tensor
    source = tensor.data.reshape(-1)
    result = np.empty(source.shape, BITS_DTYPE[dtype])
    for start in range(0, len(source), _CHUNK):
        part = slice(start, start + _CHUNK)
        values = HostTensor(tensor.dtype, source[part].shape, source[part]).float32()
        result[part] = _narrowed(values, dtype)
        if not _all_finite(result[part], dtype):
            largest = float(np.abs(values).max())
            raise ConfigError(
                f"tensor {name!r} does not fit {DTYPE_NAMES[dtype]}",
                why=f"its largest magnitude is {largest:g}",
                fix="take another --dtype: bfloat16, or float32",
            )
    return HostTensor(dtype, tensor.shape, result.reshape(tensor.shape))


def common_dtype(dtypes: Collection[str]) -> DType:
    """The narrowest dtype that holds weights of all these exactly."""
    for dtype in ("BF16", "F16"):
        if set(dtypes) == {dtype}:
            return DTYPE_TAGS[DTYPE_NAMES[dtype]]
    return "F32"


def _narrowed(values: np.ndarray, dtype: DType) -> np.ndarray:
    if dtype == "BF16":
        bits = values.view(np.uint32)
        # Half of the last kept bit, less one unless that bit is odd: a tie goes to the even one.
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        return (bits >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):  # an infinity is reported by the caller
        return values.astype(BITS_DTYPE[dtype])


def _all_finite(bits: np.ndarray, dtype: DType) -> bool:
    if dtype == "BF16":
        return bool(((bits & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(bits).all())
