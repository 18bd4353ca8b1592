"""`quarantine.jsonl`: what could not be read, one item a line, written in large blocks."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from solollm.data.items import Broken
from solollm.durable import create_file

_BLOCK_BYTES = 2**18


class Quarantine:
    """The file while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending = bytearray()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Quarantine:
        self._file = self._stack.enter_context(create_file(self._path))
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            self._file.write(self._pending)

    def add(self, item: Broken) -> None:
        self._pending += json.dumps(vars(item), ensure_ascii=False).encode() + b"\n"
        if len(self._pending) >= _BLOCK_BYTES:
            self._file.write(self._pending)
            self._pending.clear()
