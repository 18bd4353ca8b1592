"""Personal data and keys out of a corpus: masked, or the whole text left out.

What is found, and how each find proves itself, is `solollm.personal`'s, as in the server's guard;
private keys in PEM are found here, because a corpus has them whole. The record says which text held
what kinds, and never the values.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

from solollm.durable import create_file
from solollm.personal import LABELS, Find, find_personal, without_overlaps

PRIVATE_NAME = "private.jsonl"
PrivateAction = Literal["mask", "drop"]
_BLOCK_BYTES = 2**18
_KEY_BLOCK = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?:[^-]|-(?!----)){1,20000}"
    r"-----END [A-Z ]{0,30}PRIVATE KEY-----"
)


class Cleared(NamedTuple):
    """A text without what was private in it; `kinds` counts what that was."""

    text: str
    kinds: dict[str, int]


def clear(text: str) -> Cleared:
    """Every find replaced by what it was, such as `[email]`."""
    blocks = [Find("key", *found.span()) for found in _KEY_BLOCK.finditer(text)]
    finds = without_overlaps([*blocks, *find_personal(text)])
    parts, at = [], 0
    for find in finds:
        parts += [text[at : find.start], LABELS[find.kind]]
        at = find.end
    return Cleared("".join([*parts, text[at:]]), dict(Counter(find.kind for find in finds)))


class PrivateData:
    """What one build does about private data, and its record `private.jsonl`."""

    def __init__(self, path: Path, action: PrivateAction) -> None:
        self.action = action
        self.counts: Counter[str] = Counter()
        self.num_texts = 0
        self._path, self._pending = path, bytearray()

    def __enter__(self) -> PrivateData:
        self._context = create_file(self._path)
        self._file = self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        try:
            if error is None:
                self._file.write(self._pending)
        finally:
            self._context.__exit__(kind, error, trace)

    def take(self, text: str, source: str, place: str) -> str | None:
        """The text to keep; None: it is left out."""
        cleared = clear(text)
        if not cleared.kinds:
            return text
        self.num_texts += 1
        self.counts.update(cleared.kinds)
        line = {"source": source, "place": place, "done": self.action, "kinds": cleared.kinds}
        self._pending += json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if len(self._pending) >= _BLOCK_BYTES:
            self._file.write(self._pending)
            self._pending.clear()
        return cleared.text if self.action == "mask" else None
