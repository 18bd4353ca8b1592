"""The page for people, made of its pieces in `page/`: one document that loads nothing else.

Its headers name the digests of its one style and one script, so that a browser runs and loads
nothing else, whatever a model writes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_SCRIPTS = ("markdown.js", "stream.js", "pane.js", "page.js")  # in this order, as one module


@dataclass(frozen=True)
class ChatPage:
    """The document and the headers it is sent with."""

    content: bytes
    headers: Mapping[str, str]


@cache
def chat_page() -> ChatPage:
    """The page, put together."""
    pieces = files("solollm.serving").joinpath("page")

    def read(name: str) -> str:
        return pieces.joinpath(name).read_text(encoding="utf-8")

    style, script = read("page.css"), "\n".join(map(read, _SCRIPTS))
    document = read("page.html").replace("/*style*/", style).replace("/*script*/", script)
    return ChatPage(document.encode(), _headers(style, script))


def _headers(style: str, script: str) -> dict[str, str]:
    policy = (
        "default-src 'none'",
        f"script-src '{_digest(script)}'",
        f"style-src '{_digest(style)}'",
        "img-src data:",  # its icon
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
    return {
        "content-security-policy": "; ".join(policy),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-store",
    }


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
