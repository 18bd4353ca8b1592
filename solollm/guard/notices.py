"""What the guard did, told to whoever runs the server: never with the text that it was about."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal

Action = Literal["mask", "block", "warn"]
_LOG = logging.getLogger("solollm.guard")


class Notices:
    """Counts and logs (unless `is_silent`). `counts`: by (part, rule, action)."""

    def __init__(self, *, is_silent: bool = False) -> None:
        self._is_silent = is_silent
        self.counts: Counter[tuple[str, str, str]] = Counter()

    def note(self, part: str, rule: str, action: str) -> None:
        self.counts[part, rule, action] += 1
        if not self._is_silent:
            _LOG.warning("guard: %s, %s: %s", part, rule, action)
