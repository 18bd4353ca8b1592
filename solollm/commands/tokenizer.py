"""`solollm tokenizer train|inspect`: skins over `solollm.tokenizer_inspection`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from solollm.commands import console, print_json
from solollm.errors import quoted

if TYPE_CHECKING:
    from solollm.tokenizer_inspection import TokenizerReport

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
_COLORS = ("on dark_green", "on dark_blue", "on dark_magenta", "on dark_cyan")
_TRAIN_EXAMPLES = """\b
Examples:
  solollm tokenizer train notes/ books/*.txt --out tokenizers/mine --vocab-size 4096
  solollm tokenizer train python://stdlib --out tokenizers/python --vocab-size 2048
"""
_INSPECT_EXAMPLES = """\b
Examples:
  solollm tokenizer inspect tokenizers/mine --on other-notes/
  solollm tokenizer inspect runs/first/checkpoints/step-00001000 --text "In 2026, naïve cafés."
"""


@click.group("tokenizer", epilog="\b\nExample:\n  solollm tokenizer inspect tokenizers/mine")
def command() -> None:
    """Train a tokenizer, or look at one."""


@command.command("train", epilog=_TRAIN_EXAMPLES)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--vocab-size", type=int, default=4096, show_default=True,
    help="Special tokens, 256 bytes and merges together.",
)  # fmt: skip
@click.option("--max-bytes", type=click.IntRange(1), help="Learn from this much text at most.")
@click.option("--overwrite", is_flag=True, help="Replace a tokenizer that stands at --out.")
@_JSON
def train(
    *, sources: tuple[str, ...], out: Path, vocab_size: int, max_bytes: int | None,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Learn a vocabulary from SOURCES and write its files to --out.

    A source is a file, a folder, a dataset of the Hugging Face hub (hf://owner/name) or
    python://stdlib. Equal texts give an equal file. `solollm data build` trains a tokenizer by
    itself; this command is for one that several corpora share.
    """
    from solollm.tokenizer_inspection import train_from_sources

    report = train_from_sources(
        sources, out, vocab_size=vocab_size, max_bytes=max_bytes, overwrite=overwrite
    )
    _show(report, out, as_json=as_json)
    if not as_json:
        console().print(
            f"\nwritten to {out}; next:"
            f" solollm data build SOURCES --tokenizer {quoted(out)} --out CORPUS",
            markup=False, soft_wrap=True,
        )  # fmt: skip


@command.command("inspect", epilog=_INSPECT_EXAMPLES)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--on", "sources", multiple=True, metavar="SOURCE", help="Measure on these documents."
)
@click.option("--text", help="Measure on this text.")
@_JSON
def inspect(*, folder: Path, sources: tuple[str, ...], text: str | None, as_json: bool) -> None:
    """Show how the tokenizer in FOLDER cuts text: bytes per token, used and unused vocabulary.

    FOLDER is a tokenizer's, a corpus's or a checkpoint's. Measure on text that it was not trained
    on; without --on and --text it is Python's standard library.
    """
    from solollm.errors import ConfigError
    from solollm.tokenizer import Tokenizer
    from solollm.tokenizer_inspection import inspect_sources, inspect_tokenizer

    if text is not None and sources:
        raise ConfigError("both --text and --on are given", fix="leave one of them out")
    inside = folder / "tokenizer"
    tokenizer = Tokenizer.load(inside if inside.is_dir() else folder)
    if text is not None:
        report = inspect_tokenizer(tokenizer, [text], measured_on="--text")
    else:
        report = inspect_sources(tokenizer, sources or ("python://stdlib",))
    _show(report, folder, as_json=as_json)


def _show(report: TokenizerReport, folder: Path, *, as_json: bool) -> None:
    if as_json:
        figures = {
            "bytes_per_token": report.bytes_per_token,
            "used_fraction": report.used_fraction,
        }
        print_json({"tokenizer": str(folder), **asdict(report), **figures})
        return
    from rich.text import Text

    screen = console()
    lines = [
        ("measured on", report.measured_on),
        ("bytes per token", f"{report.bytes_per_token:.3f}"),
        ("", f"({report.text_bytes:,} bytes, {report.num_tokens:,} tokens)"),
        ("vocabulary", f"{report.vocab_size:,} tokens, {report.special_tokens} of them special;"
         f" {report.padded_vocab_size:,} rows in a model"),
        ("used", f"{report.used_tokens:,} tokens, {report.used_fraction:.1%} of the ordinary ones"),
        ("never used", f"{report.unused_tokens:,} merges " + _quoted(report.unused_examples)),
        ("longest", _quoted(report.longest_tokens)),
    ]  # fmt: skip
    if report.skipped_items:
        lines.append(("skipped", f"{report.skipped_items:,} items that could not be read"))
    for label, value in lines:
        screen.print(f"{label:<16} {value}", markup=False, emoji=False, soft_wrap=True)
    sample = Text("\n")
    for place, token in enumerate(report.sample):
        shown = token if screen.color_system else f"{token}|"  # colours separate the tokens
        sample.append(shown, style=_COLORS[place % len(_COLORS)])
    screen.print(sample, soft_wrap=True)


def _quoted(tokens: tuple[str, ...]) -> str:
    return " ".join(repr(token) for token in tokens)
