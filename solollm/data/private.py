"""Personal data and keys out of a corpus: masked, or the whole text left out.

What is found, and how each find proves itself, is `solollm.personal`'s, as in the server's guard;
private keys in PEM are found here, because a corpus has them whole. The record says which text held
what kinds, and never the values.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal, NamedTuple

from solollm.data.records import Records
from solollm.data.screening import LeftOut
from solollm.personal import LABELS, Find, find_personal, without_overlaps

PRIVATE_NAME = "private.jsonl"
PrivateAction = Literal["mask", "drop"]
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
    """The screen of one build, and its record."""

    def __init__(self, action: PrivateAction, records: Records) -> None:
        self._action, self.records = action, records
        self.counts: Counter[str] = Counter()
        self.num_texts = 0

    def take(self, text: str, source: str, place: str) -> str | LeftOut:
        cleared = clear(text)
        if not cleared.kinds:
            return text
        self.num_texts += 1
        self.counts.update(cleared.kinds)
        self.records.add(
            {"source": source, "place": place, "done": self._action, "kinds": cleared.kinds}
        )
        return cleared.text if self._action == "mask" else LeftOut("private data")
