"""Between MLX arrays and host tensors, and a session's state held still while it trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from solollm.backend import DType, HostTensor, Snapshot, TensorSource
from solollm.errors import IntegrityError

_TAGS: dict[mx.Dtype, DType] = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint8: "U8", mx.int32: "I32",
}  # fmt: skip
_DTYPES = {tag: dtype for dtype, tag in _TAGS.items()}


def to_host(array: mx.array) -> HostTensor:
    """The bits of an evaluated array, without conversion (bf16 as uint16)."""
    tag = _TAGS[array.dtype]
    bits = array.view(mx.uint16) if tag == "BF16" else array
    return HostTensor(tag, tuple(array.shape), np.array(bits))


def from_host(tensor: HostTensor) -> mx.array:
    """An array of the same bits."""
    array = mx.array(np.ascontiguousarray(tensor.data).reshape(tensor.shape))
    return array.view(mx.bfloat16) if tensor.dtype == "BF16" else array


class MlxSnapshot(Snapshot):
    """References to immutable arrays: free to take, safe on any thread once evaluated.

    Until it is closed the old arrays live beside the new ones, so the session holds its state
    twice.
    """

    def __init__(
        self,
        weights: Mapping[str, mx.array],
        states: Mapping[str, mx.array],
        session_state: Mapping[str, int | float],
    ) -> None:
        self._weights, self._states = dict(weights), dict(states)
        self.session_state = dict(session_state)

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        return ((name, to_host(array)) for name, array in self._weights.items())

    def optimizer(self) -> Iterator[tuple[str, HostTensor]]:
        return ((name, to_host(array)) for name, array in self._states.items())

    def parameter_specs(self) -> Sequence[tuple[str, DType, tuple[int, ...]]]:
        return [(n, _TAGS[a.dtype], tuple(a.shape)) for n, a in self._weights.items()]

    def optimizer_specs(self) -> Sequence[tuple[str, DType, tuple[int, ...]]]:
        return [(n, _TAGS[a.dtype], tuple(a.shape)) for n, a in self._states.items()]

    def close(self) -> None:
        self._weights, self._states = {}, {}


def read_all(
    source: TensorSource, expected: Mapping[str, tuple[mx.Dtype, tuple[int, ...]]], *, what: str
) -> dict[str, mx.array]:
    """Every expected array, in the expected order, evaluated. Weights of another floating dtype
    are widened to fp32; codes must be codes.

    Raises:
        IntegrityError: naming missing, unexpected and misshapen tensors.
    """
    given = set(source.names())
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in sorted(given - set(expected))]
    arrays: dict[str, mx.array] = {}
    for name, (dtype, shape) in expected.items():
        if name not in given:
            continue
        tensor = source.read(name)
        if tuple(tensor.shape) != shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        elif (tensor.dtype == "U8") != (dtype == mx.uint8) or tensor.dtype not in _DTYPES:
            problems.append(f"{name} has dtype {tensor.dtype}, expected {_TAGS[dtype]}")
        else:
            arrays[name] = from_host(tensor).astype(dtype)
    if problems:
        raise IntegrityError(
            f"the {what} cannot be taken: {'; '.join(problems[:8])}"
            + (f"; and {len(problems) - 8} more" if len(problems) > 8 else ""),
            why="names and shapes must be the model's own",
            fix="check that the checkpoint belongs to this model and optimizer",
        )
    mx.eval(arrays)
    return arrays
