"""The frozen base of an adapter: which model it is, said by content and never by a place.

`base.json` of an adapter's checkpoint is a `BaseRecord`. The base itself stays where it is; whoever
goes on with the adapter brings the folder, and its content is proven while it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from solollm.adapters import ADAPTER_CONFIG, BASE, AdapterOptions, peft_config, read_peft_config
from solollm.architecture import ModelConfig
from solollm.backend import HostTensor, TensorSource
from solollm.certificate import Digest
from solollm.errors import IntegrityError
from solollm.tensorfile import tensor_digest


class BaseRecord(BaseModel):
    """`content`: one digest of all its tensors (`content_of`); `hub_id`: where it can be had, or
    ""; `codec`: how it was quantised while this adapter was trained (`nf4`, `affine4`), "" where it
    was not; `seed`: of the adapter's first values; `config`: its `config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    content: Digest
    hub_id: str = Field("", max_length=200)
    codec: Literal["", "nf4", "affine4"] = ""
    seed: int = Field(0, ge=0)
    config: Mapping[str, Any]

    @property
    def model(self) -> ModelConfig:
        """The base's model. Raises ConfigError where it is not computed here."""
        return ModelConfig.from_hf(self.config)


class TrainedAdapter(NamedTuple):
    """What an adapter's checkpoint holds beside tensors and state."""

    options: AdapterOptions
    base: BaseRecord

    @classmethod
    def read(cls, peft: Mapping[str, Any], base: BaseRecord) -> TrainedAdapter:
        """From `adapter_config.json`, which knows of no seed and no codec. Raises ConfigError."""
        bits = 4 if base.codec else None
        known = {"base_bits": bits, "seed": base.seed}
        return cls(read_peft_config(peft).model_copy(update=known), base)

    def tables(self) -> dict[str, dict[str, Any]]:
        """File name -> JSON of what describes it on disk."""
        return {
            ADAPTER_CONFIG: peft_config(self.options, base_name=self.base.hub_id),
            BASE: self.base.model_dump(mode="json"),
        }


def content_of(digests: Mapping[str, str]) -> str:
    """One digest of a model, from the sha256 of each of its tensors' raw bytes."""
    state = hashlib.sha256()
    for name in sorted(digests):
        state.update(f"{name}={digests[name]}\n".encode())
    return state.hexdigest()


class BaseSource:
    """A base's tensors, digested as they are read: one pass over the files loads and proves."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._digests: dict[str, str] = {}

    def names(self) -> Sequence[str]:
        return self._source.names()

    def read(self, name: str) -> HostTensor:
        tensor = self._source.read(name)
        if name not in self._digests:
            self._digests[name] = tensor_digest(tensor)
        return tensor

    def content(self) -> str:
        """`content_of` the whole base; tensors that nobody asked for are read now."""
        for name in self.names():
            if name not in self._digests:
                self.read(name)
        return content_of(self._digests)

    def require(self, expected: str, place: str) -> None:
        """Raise IntegrityError unless this is the base of `expected` content."""
        require_content(self.content(), expected, place)


def require_content(found: str, expected: str, place: str) -> None:
    """Raise IntegrityError unless `place` is the base of `expected` content."""
    if found != expected:
        raise IntegrityError(
            f"{place} is not the base that this adapter was trained on",
            why=f"its content is {found[:12]}, the adapter's base.json says {expected[:12]}",
            fix="give the same base again: the same checkpoint, or the same imported model",
        )
