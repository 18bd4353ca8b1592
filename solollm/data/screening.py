"""What stands between a text that was read and the corpus: a screen passes it, changes it, or says
why it stays out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from solollm.data.records import Records


class LeftOut(NamedTuple):
    """Why a text stays out: `reason` is one of a few fixed phrases, `detail` is about this text,
    `beginning` of it, where that may be shown."""

    reason: str
    detail: str = ""
    beginning: str = ""


class Screen(Protocol):
    """One of them. `records` says what it did about single texts, and is open while it works."""

    records: Records

    def take(self, text: str, source: str, place: str) -> str | LeftOut: ...
