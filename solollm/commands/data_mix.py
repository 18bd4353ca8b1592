"""`solollm data mix`: a skin over `mix_corpora`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from solollm.commands import Number, print_json
from solollm.commands.building import build_progress, print_text
from solollm.errors import ConfigError, quoted

if TYPE_CHECKING:
    from solollm.data.mixing import Part


@click.command(
    "mix",
    epilog="\b\nExamples:\n"
    "  solollm data mix corpora/web=0.7 corpora/code=0.3 --out corpora/mixed\n"
    "  solollm data mix corpora/web=3 corpora/law=1 --tokens 2e9 --out corpora/mixed",
)
@click.argument("corpora", nargs=-1, required=True, metavar="CORPUS[=WEIGHT]...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to create.")
@click.option(
    "--tokens", type=Number(), help="Of the training split; default: as many as CORPORA hold."
)
@click.option("--overwrite", is_flag=True, help="Replace a corpus that stands at --out.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def mix(
    *, corpora: tuple[str, ...], out: Path, tokens: float | None, overwrite: bool, as_json: bool
) -> None:
    """Make one corpus of several built ones, by shares of the training tokens.

    All need the same tokenizer (`data build --tokenizer`). A corpus that is to give more than it
    holds is repeated, one that is to give less is sampled. Without weights each gives what it
    holds.
    """
    from solollm.data.mixing import mix_corpora
    from solollm.data.report import render_report

    parts = [_part(argument) for argument in corpora]
    with build_progress(hidden=as_json) as progress:
        report = mix_corpora(
            parts, out, tokens=None if tokens is None else int(tokens), overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    if as_json:
        print_json({"corpus": str(out), **report.model_dump(mode="json")})
        return
    print_text(render_report(report))
    run = quoted(f"runs/{out.name}")
    print_text(f"\nwritten to {out}; next:\nsolollm pretrain --corpus {quoted(out)} --run {run}")


def _part(argument: str) -> Part:
    from solollm.data.mixing import Part

    name, equals, weight = argument.rpartition("=")
    if not equals or Path(argument).exists():
        return Part(Path(argument))
    try:
        return Part(Path(name), float(weight))
    except ValueError as error:
        raise ConfigError(
            f"the weight {weight!r} in {argument!r} is no number", fix="write corpora/web=0.7"
        ) from error
