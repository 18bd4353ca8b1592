"""One file per subcommand: a thin skin over a typed function that Python users call too.

Only here (and in `solollm.cli`) is anything printed. `console()` is the one place that a terminal
is opened.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """The terminal. Styles only on a terminal, and none at all under NO_COLOR."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR"))
    return Console(stderr=stderr, highlight=False, color_system=None if plain else "auto")


class Number(click.FloatRange):
    """A float within bounds, which "nan" and "inf" are not."""

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
