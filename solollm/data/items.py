"""What comes out of a source, item by item: a document, something broken, or a file passed over.

Every item that a source holds ends as exactly one of the first two, so that a build can account
for all of them; passing over is for whole files and folders that are not text at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from solollm.errors import ConfigError

_EXCERPT_CHARS = 200


@dataclass(frozen=True)
class Document:
    """A text as it was found. `place` says where within `source`: a line, a row, a part."""

    text: str
    source: str
    place: str = ""


@dataclass(frozen=True)
class Broken:
    """An item, or the rest of a file, that cannot be used. `reason` is one of a few fixed phrases,
    `detail` and `excerpt` are about this one; all are safe to print."""

    source: str
    place: str
    reason: str
    detail: str = ""
    excerpt: str = ""


@dataclass(frozen=True)
class PassedOver:
    """A file or folder inside a given folder that was not read, and why."""

    source: str
    reason: str


Item = Document | Broken | PassedOver


@dataclass(frozen=True)
class Limits:
    """What reading may cost; inputs beyond it are split or quarantined, never fatal.

    Attributes:
        max_document_chars: longer texts are split at the last blank line, newline or space.
        max_line_bytes: longer JSON lines and JSON array elements are quarantined.
        max_ratio: decompressed / compressed bytes, once `ratio_after_bytes` came out.
        max_decompressed_bytes: of one file.
        text_fields: where a JSON object, table row or dataset row keeps its text; first found.
    """

    max_document_chars: int = 2**20
    max_line_bytes: int = 2**23
    max_ratio: float = 200.0
    ratio_after_bytes: int = 2**24
    max_decompressed_bytes: int = 2**38
    text_fields: tuple[str, ...] = ("text", "content")

    def __post_init__(self) -> None:
        for name in ("max_document_chars", "max_line_bytes", "max_decompressed_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_ratio <= 0 or not self.text_fields:
            raise ConfigError("max_ratio must be above 0, and text_fields must name a field")


class Unreadable(Exception):
    """The rest of the file being read cannot be used. Never leaves `solollm.data`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def excerpt(content: str | bytes) -> str:
    """The beginning of anything as text that any encoder takes."""
    head = content[:_EXCERPT_CHARS]
    if isinstance(head, bytes):
        return head.decode("utf-8", "backslashreplace")
    return head.encode("utf-8", "backslashreplace").decode()
