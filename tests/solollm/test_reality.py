"""The plan against what became of it."""

from __future__ import annotations

from solollm.reality import compare, measure


def test_a_run_is_measured_from_its_rows() -> None:
    """An average that a slow first interval spoils, a peak taken from the last row."""
    rows = [
        {"kind": "train", "step": 10, "tokens_seen": 100, "tokens_per_second": None,
         "peak_memory_bytes": 700, "elapsed_seconds": 9.0},
        {"kind": "eval", "step": 10, "loss": 3.0},
        {"kind": "train", "step": 20, "tokens_seen": 200, "tokens_per_second": 50.0,
         "peak_memory_bytes": 900, "elapsed_seconds": 11.0},
        {"kind": "train", "step": 30, "tokens_seen": 300, "tokens_per_second": 52.0,
         "peak_memory_bytes": 800, "elapsed_seconds": 13.0},
    ]  # fmt: skip
    assert measure(rows) == {
        "tokens_per_second": 51.0, "peak_memory_bytes": 900.0, "steps": 30.0, "tokens": 300.0,
        "seconds": 13.0,
    }  # fmt: skip
    assert measure([]) == {}


def test_only_what_was_expected_and_measured_is_compared() -> None:
    """A comparison with a quantity that nobody measured."""
    plan = {
        "expected": {"tokens_per_second": 100.0, "kilowatt_hours": 2.0, "rate_source": "x"},
        "measured": {"tokens_per_second": 80.0, "steps": 5.0},
    }
    (line,) = compare(plan)
    assert (line.name, line.expected, line.measured, line.ratio) == (
        "tokens_per_second", 100.0, 80.0, 0.8,
    )  # fmt: skip
    assert compare({}) == []
