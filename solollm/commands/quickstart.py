"""`solollm quickstart`: the story of `solollm.quickstart`, told on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import click
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from solollm.commands import Number, console


def free_folder(wanted: Path) -> Path:
    """`wanted`, or with the first number behind it that makes it new or empty."""
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
    return next(path for path in chain([wanted], numbered) if not path.exists() or _is_empty(path))


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


class TerminalNarrator:
    """A rule per stage, plain sentences, commands as they would be typed."""

    def __init__(self, terminal: Console) -> None:
        self._terminal = terminal
        self._stage = 0

    def stage(self, title: str, why: str) -> None:
        self._stage += 1
        self._terminal.print()
        self._terminal.print(Rule(f"{self._stage}. {title}", align="left"))
        self._terminal.print(Text(why, style="dim"))

    def say(self, text: str) -> None:
        self._terminal.print(Text(text))

    def command(self, arguments: Sequence[str], program: str = "solollm") -> None:
        line = Text("$ ", style="dim") + Text(f"{program} {shlex.join(arguments)}", style="bold")
        self._terminal.print(line, soft_wrap=True)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        grid = Table.grid(padding=(0, 2))
        for name, value in rows:
            grid.add_row(Text(name, style="dim"), Text(value))
        self._terminal.print(grid)

    def text(self, prompt: str, continuation: str) -> None:
        self._terminal.print(Text(prompt, style="bold") + Text(continuation))
        self._terminal.print(Text("·" * 3, style="dim"))


@click.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=None,
    help="Where corpus and run are written; must be new or empty. Default: quickstart, or"
    " quickstart-2 and so on where that is taken.",
)
@click.option(
    "--data",
    "sources",
    multiple=True,
    metavar="PATH",
    help="Your own text: a file or folder, any number of times. Default: Python's own source.",
)
@click.option("--backend", default="auto", show_default=True, help="auto, or a backend's name.")
@click.option(
    "--training-seconds",
    type=Number(min=1),
    default=None,
    help="How long the training part takes. Default: so that all ends within six minutes.",
)
def command(
    folder: Path | None, sources: tuple[str, ...], backend: str, training_seconds: float | None
) -> None:
    """The whole life of a small model, offline, in a few minutes.

    Builds a corpus, trains a tokenizer and a model, kills the training half-way, resumes it to the
    same bits, and lets the model write.

    \b
    Example:
      solollm quickstart
      solollm quickstart --data ~/notes --folder first-try
    """
    from solollm.quickstart import TRAINING_SECONDS, quickstart

    terminal = console()
    try:
        quickstart(
            folder or free_folder(Path("quickstart")),
            TerminalNarrator(terminal),
            sources=sources,
            backend=backend,
            training_seconds=training_seconds or TRAINING_SECONDS,
        )
    finally:
        terminal.show_cursor(True)  # a killed child may have hidden it
