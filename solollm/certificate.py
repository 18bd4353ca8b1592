"""The certificate of a checkpoint: what proves, on another machine or backend, that a run went on.

It names every weight and optimizer tensor by digest and, when a run is stopped or packed, what the
next two batches are and what the weights make of them. `docs/reference/checkpoint.md` has the
format; the checks that recompute a continuation are made where a run is resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from solollm.backend import HostTensor, TensorSource
from solollm.strictfile import refused
from solollm.tensorfile import tensor_digest

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Continuation(BaseModel):
    """What comes next, measured at the checkpoint's own weights: digests and losses (nats/token) of
    the next two batches, the gradient norm of the first. `environment`: what it was measured in, as
    a run's lineage says it, where that is not what the checkpoint was trained in."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    batches: tuple[str, str]
    losses: tuple[float, float]
    grad_norm: float = Field(ge=0)
    environment: Mapping[str, Any] | None = None


class Certificate(BaseModel):
    """sha256 of the raw bytes of every tensor, by name, in file order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    step: int = Field(ge=0)
    parameters: Mapping[str, Digest]
    optimizer: Mapping[str, Digest]
    continuation: Continuation | None = None

    @property
    def digest(self) -> str:
        """One digest of the whole state: equal for two runs iff every tensor is bit-equal."""
        state = hashlib.sha256()
        for table in (self.parameters, self.optimizer):
            for name in sorted(table):
                state.update(f"{name}={table[name]}\n".encode())
            state.update(b"\n")
        return state.hexdigest()


class CertifiedSource:
    """A `TensorSource` that proves each tensor against its digest as it is read."""

    def __init__(self, source: TensorSource, digests: Mapping[str, str], path: Path) -> None:
        self._source = source
        self._digests = digests
        self._path = path

    def names(self) -> Sequence[str]:
        return self._source.names()

    def read(self, name: str) -> HostTensor:
        tensor = self._source.read(name)
        if tensor_digest(tensor) != self._digests.get(name):
            raise refused(self._path, f"tensor {name!r}", "is not the one that was certified")
        return tensor
