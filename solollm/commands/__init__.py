"""One file per subcommand: a thin skin over a typed function that Python users call too.

Only here (and in `solollm.cli`) is anything printed. `console()` is the one place that a terminal
is opened.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """The terminal. Styles only on a terminal, and none at all under NO_COLOR."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR"))
    return Console(stderr=stderr, highlight=False, color_system=None if plain else "auto")


def print_json(value: Any) -> None:
    """One JSON document on one line of standard output."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)
