"""`solollm runs watch`: the skin of `solollm.following.follow`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from solollm.commands import console
from solollm.commands.pretrain import say
from solollm.errors import quoted

if TYPE_CHECKING:
    from solollm.following import News
    from solollm.report.console import ConsoleSink, JsonSink

_EPILOG = """\b
Examples:
  solollm runs watch runs/first
  solollm runs watch runs/first --wait
  solollm runs watch runs/first --json
"""


@click.command("watch", epilog=_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--wait", is_flag=True, help="Stay while it stands still, until it is finished.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON per row instead.")
def command(run: Path, wait: bool, as_json: bool) -> int:
    """Follow RUN, which another terminal or process trains, as if it trained here.

    Only reads: the run does not notice, and Ctrl-C leaves it alone. Ends with 0 once the run is
    finished, with 75 where it has stopped and `solollm resume` goes on, with 1 where it failed.
    """
    from solollm.following import EXIT_CODES, facts_of, follow
    from solollm.report.console import ConsoleSink, JsonSink

    facts = {**facts_of(run), "doing": "watching"}
    watcher = JsonSink(click.echo) if as_json else ConsoleSink(console(), line_seconds=0.0)
    watcher.start(facts)
    state, total, news = facts["state"], facts["total_steps"], None
    try:
        for news in follow(run, wait=wait):
            _tell(watcher, news)
            if news.state != state or (wait and news.past is not None):
                _tell_state(watcher, news, wait=wait)
            state = news.state
    except KeyboardInterrupt:
        if not as_json:
            watcher.finish({})
            say("no longer watched; the run itself is as it was")
        return 130
    assert news is not None, "the first news come at once"
    watcher.finish({"status": state, "step": news.step, "total_steps": total})
    if not as_json:
        say(_ending(run, news, total))
    return EXIT_CODES.get(state, 1)


def _tell(watcher: ConsoleSink | JsonSink, news: News) -> None:
    """Events first where the run went back to `past`: they say why."""
    if news.past is not None:
        _tell_events(watcher, news)
        watcher.recall(news.past)
    tells = {"eval": watcher.evaluation, "sample": watcher.sample}
    for row in news.rows:
        tells.get(str(row.get("kind")), watcher.metrics)(row)
    if news.past is None:
        _tell_events(watcher, news)


def _tell_events(watcher: ConsoleSink | JsonSink, news: News) -> None:
    for row in news.events:
        watcher.event(row)


def _tell_state(watcher: ConsoleSink | JsonSink, news: News, *, wait: bool) -> None:
    """A machine hears every change; a person of a wait, and the rest at the end."""
    from solollm.report.console import JsonSink

    if isinstance(watcher, JsonSink):
        watcher.event({"kind": "state", "state": news.state, "step": news.step})
    elif wait and news.state in ("new", "stopped", "failed"):
        watcher.event({"kind": f"waiting for it to go on: {news.state} at step {news.step:,}"})


def _ending(run: Path, news: News, total: int | None) -> str:
    place = f"step {news.step:,}" + (f" of {total:,}" if total else "")
    if news.state == "finished":
        return f"{run} is finished: {place}; curves: {run / 'report.html'}"
    if news.state == "unreadable":
        return f"{run} cannot be read any more; it was at {place}"
    why = " (its process ended without a word)" if not news.ending and news.state != "new" else ""
    how = {"new": "has not begun", "stopped": "has stopped"}.get(news.state, "has failed")
    return f"{run} {how}{why}: {place}; `solollm resume {quoted(run)}` goes on"
