"""One file per subcommand: a thin skin over a typed function that Python users call too.

Only here (and in `solollm.cli`) is anything printed. `console()` is the one place that a terminal
is opened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """The terminal. Styles only on a terminal, and none at all under NO_COLOR."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR"))
    return Console(stderr=stderr, highlight=False, color_system=None if plain else "auto")


def print_table(terminal: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows of figures under their names, the first column being words."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    terminal.print(table)


class Number(click.FloatRange):
    """A float within bounds, if any, which "nan" and "inf" are not."""

    def __init__(self, min: float | None = None, max: float | None = None, **options: bool) -> None:
        super().__init__(min, max, **options)
        if min is None and max is None:
            self.name = "float"  # of help, which would call it a range

    def _describe_range(self) -> str:
        """For help, which would say `x<=None`."""
        return "" if self.min is None and self.max is None else super()._describe_range()

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is no number to count with.", param, ctx)
        return number


def print_json(value: Any) -> None:
    """One JSON document on one line of standard output."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)
