"""A machine whose pressure, heat and power a test writes down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from solollm.vitals import Host, Vitals


class ScriptedHost(Host):
    """Gives `script` one look after the other, the last of them for ever. `awake` counts how many
    hold it awake now, `looks` how often it was looked at."""

    def __init__(self, script: Sequence[Vitals] = (), *, oom_kills: Sequence[int] = (0,)) -> None:
        self._script = list(script) or [Vitals()]
        self._oom_kills = list(oom_kills)
        self.awake = 0
        self.looks = 0

    def vitals(self) -> Vitals:
        self.looks += 1
        return self._script.pop(0) if len(self._script) > 1 else self._script[0]

    def oom_kills(self) -> int:
        return self._oom_kills.pop(0) if len(self._oom_kills) > 1 else self._oom_kills[0]

    def awake_command(self, pid: int) -> Sequence[str]:
        return []

    @contextmanager
    def keep_awake(self) -> Iterator[bool]:
        self.awake += 1
        try:
            yield True
        finally:
            self.awake -= 1
