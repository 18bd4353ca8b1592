"""Whether an installed version lies in the tested range."""

from __future__ import annotations


def within(found: str, first: str, below: str) -> bool:
    """first <= found < below, by the leading numbers of each part; unknown counts as outside."""
    numbers = _numbers(found)
    return bool(numbers) and _numbers(first) <= numbers < _numbers(below)


def _numbers(text: str) -> tuple[int, ...]:
    parts = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
