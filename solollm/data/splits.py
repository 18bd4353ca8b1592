"""Which documents are held out for validation: decided by content, never by place or chance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from solollm.errors import ConfigError

SplitRule = Literal["hash", "sha1-mod20"]


@dataclass(frozen=True)
class HeldOut:
    """The rule: a share of all digests ("hash"), or every SHA-1 that is 0 modulo 20.

    Adding documents moves none between the splits, and equal texts are never on both sides.
    """

    rule: SplitRule = "hash"
    fraction: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ConfigError(f"validation_fraction must be from 0 to below 1, not {self.fraction}")

    @property
    def share(self) -> float:
        """The expected share of documents."""
        return 0.05 if self.rule == "sha1-mod20" else self.fraction

    def takes(self, text: bytes, digest: bytes) -> bool:
        """Is this text (UTF-8, with its `text_digest`) held out?"""
        if self.rule == "sha1-mod20":
            return int.from_bytes(hashlib.sha1(text, usedforsecurity=False).digest()) % 20 == 0
        # Not the bytes that order documents, or all that is held out would lie together.
        return int.from_bytes(digest[8:]) < self.fraction * 2**64


def tail_start(text: str, wanted: int) -> int:
    """Where the last `wanted` characters begin: at most half the text, if possible on a line."""
    at = len(text) - min(wanted, len(text) // 2)
    line = text.find("\n", at) + 1
    return line if 0 < line < len(text) else at
