"""`solollm data mix`: the terminal skin of `mix_corpora`."""

from __future__ import annotations

from pathlib import Path

import click

from solollm.commands import Number
from solollm.commands.data_progress import show_built, shown_progress

_EPILOG = """\b
Examples:
  solollm data mix corpora/web=0.7 corpora/code=0.3 --out corpora/mixed
  solollm data mix corpora/web=3 corpora/notes --tokens 2e9 --out corpora/mixed
"""


@click.command("mix", epilog=_EPILOG)
@click.argument("parts", nargs=-1, required=True, metavar="CORPUS[=WEIGHT]...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to create.")
@click.option(
    "--tokens", type=Number(min=1),
    help="Training tokens of the result; default: as many as the corpora hold together.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a corpus that stands at --out.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def mix(
    parts: tuple[str, ...], out: Path, tokens: float | None, overwrite: bool, as_json: bool
) -> None:
    """Make one corpus of built ones, by their shares of the training tokens.

    WEIGHT is any number above 0 (default 1): of 3 and 1 the first gives three quarters. A corpus
    that holds less than its share is passed several times, one that holds more gives a part of its
    documents. All must have one tokenizer: build the second with --tokenizer FIRST/tokenizer. What
    one of them holds out is trained on in none.
    """
    from solollm.data.mixing import mix_corpora
    from solollm.data.parts import parse_part

    with shown_progress(hidden=as_json) as progress:
        report = mix_corpora(
            [parse_part(part) for part in parts], out,
            tokens=None if tokens is None else int(tokens), overwrite=overwrite, progress=progress,
        )  # fmt: skip
    show_built(report, out, as_json=as_json)
