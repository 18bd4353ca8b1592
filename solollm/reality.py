"""The plan against what became of it: both lie in a run's `plan.json`, under `expected` and
`measured`, and are shown side by side by `solollm runs show` and in `report.html`.

What is expected comes from `solollm.planning`, what is measured from the rows of `metrics.jsonl`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Line(NamedTuple):
    """One quantity, planned and measured, in the unit that the end of `name` says."""

    name: str
    expected: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over expected; 0 where nothing was expected."""
        return self.measured / self.expected if self.expected else 0.0


def measure(metrics: Sequence[Row]) -> dict[str, float]:
    """What the rows of a run say of its speed and memory; empty before the first."""
    trained = [row for row in metrics if row.get("kind") == "train"]
    if not trained:
        return {}
    speeds = [row["tokens_per_second"] for row in trained if row.get("tokens_per_second")]
    peaks = [row["peak_memory_bytes"] for row in trained if row.get("peak_memory_bytes")]
    found = {
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_memory_bytes": max(peaks, default=None),
        "steps": trained[-1].get("step"),
        "tokens": trained[-1].get("tokens_seen"),
        "seconds": trained[-1].get("elapsed_seconds"),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def compare(plan: Row) -> list[Line]:
    """Every quantity of `plan.json` that was both expected and measured."""
    expected, measured = plan.get("expected") or {}, plan.get("measured") or {}
    lines = []
    for name, value in expected.items():
        other = measured.get(name)
        if isinstance(value, int | float) and isinstance(other, int | float):
            lines.append(Line(name, float(value), float(other)))
    return lines
