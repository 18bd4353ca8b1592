"""MLX arrays to and from the bits that cross the seam, and the snapshot made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from solollm.backend import DType, HostTensor, Snapshot, TensorSource
from solollm.errors import IntegrityError

TAGS: Mapping[mx.Dtype, DType] = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16",
    mx.int16: "I16", mx.int32: "I32", mx.uint8: "U8",
}  # fmt: skip
Specs = Sequence[tuple[str, DType, tuple[int, ...]]]
Expected = Mapping[str, tuple[mx.Dtype, tuple[int, ...]]]


def to_host(array: mx.array) -> HostTensor:
    """A copy of an array's bits on the host (bf16 as uint16, which NumPy has)."""
    tag = TAGS[array.dtype]
    bits = array.view(mx.uint16) if tag == "BF16" else array
    return HostTensor(tag, tuple(array.shape), np.array(bits))


def from_host(host: HostTensor) -> mx.array:
    """An array of the same bits, a copy."""
    array = mx.array(np.ascontiguousarray(host.data).reshape(host.shape))
    return array.view(mx.bfloat16) if host.dtype == "BF16" else array


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
        """The arrays must be evaluated."""
        self.session_state = dict(session_state)
        self._weights, self._states = dict(weights), dict(states)

    def parameters(self) -> Iterator[tuple[str, HostTensor]]:
        return ((name, to_host(array)) for name, array in self._weights.items())

    def optimizer(self) -> Iterator[tuple[str, HostTensor]]:
        return ((name, to_host(array)) for name, array in self._states.items())

    def parameter_specs(self) -> Specs:
        return _specs(self._weights)

    def optimizer_specs(self) -> Specs:
        return _specs(self._states)

    def close(self) -> None:
        self._weights.clear()
        self._states.clear()


def _specs(arrays: Mapping[str, mx.array]) -> Specs:
    return [(name, TAGS[a.dtype], tuple(a.shape)) for name, a in arrays.items()]


def read_weights(
    source: TensorSource, expected: Expected, *, may_tie: bool = False
) -> dict[str, mx.array]:
    """Every expected parameter, in the expected order (which decides the order of the norm's sum),
    evaluated; widened or rounded to the expected dtype. `may_tie`: a second copy of the tied head,
    which some exporters write, is passed over.

    Raises:
        IntegrityError: names the missing, unexpected and misshapen ones.
    """
    return dict(read_each(source, expected, may_tie=may_tie))


def read_each(
    source: TensorSource, expected: Expected, *, may_tie: bool = False
) -> Iterator[tuple[str, mx.array]]:
    """`read_weights` one at a time, for who does not keep them as they are. Names are looked at
    before the first is read, shapes as they come."""
    problems: list[str] = []
    yield from _read(source, expected, problems, may_tie=may_tie)
    if problems:
        raise IntegrityError(
            f"the weights do not fit this model: {'; '.join(problems[:20])}",
            why=f"{len(problems)} of {len(expected)} tensors differ from its name table",
            fix="use the configuration that the weights were saved with",
        )


def read_states(source: TensorSource, expected: Expected) -> dict[str, mx.array]:
    """Every optimizer state, in the expected order, evaluated.

    Raises:
        IntegrityError: names what is missing, unexpected, or of another dtype or shape.
    """
    problems: list[str] = []
    arrays = dict(_read(source, expected, problems, exact=True))
    if problems:
        shown = ", ".join(problems[:8]) + (", ..." if len(problems) > 8 else "")
        raise IntegrityError(
            f"the optimizer state does not fit: {len(problems)} tensors: {shown}",
            why="its names, dtypes and shapes must be those of this session's optimizer",
            fix="resume with the optimizer settings that the checkpoint was written with",
        )
    return arrays


def _read(
    source: TensorSource,
    expected: Expected,
    problems: list[str],
    *,
    exact: bool = False,
    may_tie: bool = False,
) -> Iterator[tuple[str, mx.array]]:
    """The arrays that fit; `problems` takes up what is wrong. Nothing is read where names differ.
    `exact`: the dtype must be the expected one."""
    names = set(source.names()) - ({"lm_head.weight"} if may_tie else set())
    problems += [f"missing {name}" for name in expected if name not in names]
    problems += [f"unexpected {name}" for name in sorted(names - set(expected))]
    for name, (dtype, shape) in expected.items() if not problems else ():
        host = source.read(name)
        allowed = (TAGS[dtype],) if exact else ("F32", "F16", "BF16")
        if tuple(host.shape) != shape:
            problems.append(f"misshapen {name}: {list(host.shape)} instead of {list(shape)}")
        elif host.dtype not in allowed:
            problems.append(f"{name} is {host.dtype} instead of {' or '.join(allowed)}")
        else:
            array = from_host(host).astype(dtype)
            mx.eval(array)
            yield name, array
