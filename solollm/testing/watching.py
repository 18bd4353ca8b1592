"""A sink for tests: it keeps the events of a run, and can stop the run at a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


class StopAt:
    """Sends this process a SIGTERM at the train row of `step`, which needs `log.every_steps` 1.
    The run stops one step later: that one is under way already."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.events: list[Row] = []
        self.facts: Row = {}

    def start(self, facts: Row) -> None:
        self.facts = facts

    def metrics(self, row: Row) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluation(self, row: Row) -> None: ...
    def sample(self, row: Row) -> None: ...

    def event(self, row: Row) -> None:
        self.events.append(row)

    def finish(self, summary: Row) -> None: ...

    def of_kind(self, kind: str) -> list[Row]:
        """The events of one kind, oldest first."""
        return [event for event in self.events if event["kind"] == kind]
