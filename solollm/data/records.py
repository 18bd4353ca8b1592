"""Lines of JSON beside a corpus: what became of single items."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from solollm.durable import create_file

_BLOCK_BYTES = 2**18


class Records:
    """A file of them while it is written, in large blocks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending = bytearray()
        self._stack = ExitStack()

    def __enter__(self) -> Records:
        self._file = self._stack.enter_context(create_file(self._path))
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            self._file.write(self._pending)

    def add(self, record: Mapping[str, Any]) -> None:
        self._pending += json.dumps(record, ensure_ascii=False).encode() + b"\n"
        if len(self._pending) >= _BLOCK_BYTES:
            self._file.write(self._pending)
            self._pending.clear()
