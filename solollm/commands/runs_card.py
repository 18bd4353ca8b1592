"""`solollm runs card`: the skin of `solollm.export.run_card`."""

from __future__ import annotations

from pathlib import Path

import click

from solollm.commands import console
from solollm.commands.pretrain import say

_EPILOG = """\b
Examples:
  solollm runs card runs/first
  solollm runs card runs/first --out README.md --licence apache-2.0 --language en
"""


@click.command("card", epilog=_EPILOG)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write it here; default: print it.")
@click.option("--name", default="", help="Of the model; default: the run's.")
@click.option("--licence", default="", help="As the Hugging Face hub spells it: apache-2.0.")
@click.option(
    "--language", "languages", multiple=True, help="Of its text, as there: en. Repeatable."
)
def card(run: Path, out: Path | None, name: str, licence: str, languages: tuple[str, ...]) -> None:
    """The model card of RUN, in Markdown: what it is, what it was trained on, where, and how good
    it is, from the run's own files alone.

    No path, no host and no name of a file that the corpus was made of is in it; a text of `solollm
    eval --text` stands there by its file's name. An export of a run has the card as README.md.
    """
    from solollm import durable
    from solollm.errors import ConfigError
    from solollm.export.run_card import run_card

    if out is not None and out.exists():
        raise ConfigError(f"{out} is there already", fix="give another --out, or remove it first")
    text = run_card(run, name=name, licence=licence, languages=languages, tell=say_aside)
    if out is None:
        click.echo(text, nl=False)
        return
    durable.replace_file(out, text.encode("utf-8", "replace"))
    say(f"written to {out}")


def say_aside(note: str) -> None:
    """On standard error: standard output is the card's."""
    console(stderr=True).print(note, markup=False, soft_wrap=True)
