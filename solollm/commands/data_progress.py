"""What the commands that write corpora show: a bar while they work, the report, foreign text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from solollm.commands import console, print_json
from solollm.errors import quoted

if TYPE_CHECKING:
    from solollm.data.build import Progress
    from solollm.data.report import CorpusReport

_STAGES = {
    "reading": "Reading", "comparing": "Comparing", "tokenizer": "Sampling", "encoding": "Encoding",
    "checking": "Checking", "writing": "Writing",
}  # fmt: skip


def print_text(text: str) -> None:
    """Foreign text, as it is: no markup, no wrapping."""
    console().print(text, markup=False, emoji=False, soft_wrap=True)


def show_built(report: CorpusReport, out: Path, *, as_json: bool) -> None:
    """What became of a corpus that was just written, and what to do with it."""
    from solollm.data.report import render_report

    if as_json:
        print_json({"corpus": str(out), **report.model_dump(mode="json")})
        return
    print_text(render_report(report))
    run = quoted(f"runs/{out.name}")
    print_text(f"\nwritten to {out}; next:\nsolollm pretrain --corpus {quoted(out)} --run {run}")


@contextmanager
def shown_progress(*, hidden: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A bar on standard error while a build runs; nothing where nobody looks."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description:<9}"), bars.BarColumn(), bars.DownloadColumn(),
        bars.TransferSpeedColumn(), bars.TimeRemainingColumn(),
    )  # fmt: skip
    with bars.Progress(*columns, console=console(stderr=True), transient=True) as display:
        tasks: dict[str, bars.TaskID] = {}

        def show(state: Progress) -> None:
            if state.stage not in tasks:
                tasks[state.stage] = display.add_task(_STAGES[state.stage], total=state.total)
            display.update(tasks[state.stage], completed=state.done, total=state.total)

        yield show
