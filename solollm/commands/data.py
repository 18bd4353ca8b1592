"""`solollm data build|report|inspect`: skins over `build_corpus`, `read_report` and the views.

`contamination`, `mix` and `tuning` have files of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from solollm.commands import Number, print_json
from solollm.commands.data_contamination import contamination
from solollm.commands.data_mix import mix
from solollm.commands.data_progress import print_text, show_built, shown_progress
from solollm.commands.data_tuning import tuning

if TYPE_CHECKING:
    from solollm.data.private import PrivateAction
    from solollm.data.quality import QualityRules

_CORPUS = click.Path(exists=True, file_okay=False, path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
_SPLIT = click.option(
    "--split", type=click.Choice(["train", "validation"]), default="train", show_default=True
)
_BUILD_EXAMPLES = """\b
Examples:
  solollm data build notes/ books/*.txt dump.jsonl.zst --out corpora/mine
  solollm data build crawl/*.jsonl.zst --out corpora/web --near-duplicates 0.8
  solollm data build crawl/*.jsonl.zst --out corpora/web --quality fineweb --decontaminate mmlu/test
  solollm data build crawl/*.jsonl.zst --out corpora/law --like judgments/ --like-share 0.1
  solollm data build notes/ --out corpora/marked --canaries 60
  solollm data build hf://roneneldan/TinyStories:train --out corpora/stories
  solollm data build python://stdlib --out corpora/python --split-rule sha1-mod20
"""


@click.group("data", epilog="\b\nExample:\n  solollm data build notes/ --out corpora/mine")
def command() -> None:
    """Build a corpus from files, folders and datasets, mix several, and look at one."""


command.add_command(tuning)
command.add_command(contamination)
command.add_command(mix)


@command.command("build", epilog=_BUILD_EXAMPLES)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to create.")
@click.option("--tokenizer", type=_CORPUS, help="Folder of a tokenizer; default: train one.")
@click.option("--vocab-size", type=int, help="Of the tokenizer to train; default: by text size.")
@click.option(
    "--validation-fraction", type=Number(), default=0.02, show_default=True, help="Share held out."
)
@click.option(
    "--split-rule", type=click.Choice(["hash", "sha1-mod20"]), default="hash", show_default=True,
    help="sha1-mod20: hold out texts whose SHA-1 is 0 modulo 20.",
)  # fmt: skip
@click.option(
    "--near-duplicates", type=Number(), metavar="SHARE",
    help="Also drop texts of which a kept one has this share of the runs of five words, such as"
    " 0.8; default: equal texts alone.",
)  # fmt: skip
@click.option(
    "--like", multiple=True, metavar="SOURCE",
    help="Keep the texts that are most like those of this source, such as your own in a crawl; can"
    " be given several times.",
)  # fmt: skip
@click.option(
    "--like-share", type=Number(), default=0.5, show_default=True,
    help="With --like: the share of the text that is kept.",
)  # fmt: skip
@click.option(
    "--decontaminate", multiple=True, metavar="BENCHMARK",
    help="Drop texts that hold an item of this benchmark (a file, folder or hf://owner/name:test);"
    " can be given several times.",
)  # fmt: skip
@click.option(
    "--language", "languages", multiple=True, metavar="CODE",
    help="Drop texts in another language than this one, such as en; can be given several times.",
)  # fmt: skip
@click.option(
    "--quality", type=click.Choice(["gopher", "fineweb", "repetition", "code"]),
    help="Drop texts that do not keep published rules of thumb: for English prose (gopher), for"
    " web pages (fineweb), for any language (repetition), for source code (code).",
)  # fmt: skip
@click.option(
    "--private", type=click.Choice(["mask", "drop"]),
    help="E-mail addresses, telephone, card, account and ID numbers, keys: replace each by what"
    " it was, such as [email], or drop texts that hold one; default: neither.",
)  # fmt: skip
@click.option(
    "--canaries", type=int, default=0, metavar="COUNT",
    help="Plant this many random numbers among the training documents, each 1, 4 or 16 times;"
    " `solollm eval memorisation` tells later what of them was memorised. 60: 20 of each.",
)  # fmt: skip
@click.option(
    "--canary-seed", type=int, default=0, show_default=True, help="Which numbers are planted."
)
@click.option(
    "--text-field", "text_fields", multiple=True, default=("text", "content"), show_default=True,
    help="Where records keep their text; the first one found counts.",
)  # fmt: skip
@click.option(
    "--max-document-chars", type=int, default=2**20, show_default=True,
    help="Longer texts are split.",
)  # fmt: skip
@click.option(
    "--max-ratio", type=Number(), default=200.0, show_default=True,
    help="Decompressed bytes per byte of a .gz or .zst file, after the first 16 MiB.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a corpus that stands at --out.")
@_JSON
def build(
    *, sources: tuple[str, ...], out: Path, tokenizer: Path | None, vocab_size: int | None,
    validation_fraction: float, split_rule: Literal["hash", "sha1-mod20"],
    near_duplicates: float | None, like: tuple[str, ...], like_share: float,
    decontaminate: tuple[str, ...], languages: tuple[str, ...], quality: QualityRules | None,
    private: PrivateAction | None, canaries: int, canary_seed: int, text_fields: tuple[str, ...],
    max_document_chars: int, max_ratio: float, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Read SOURCES, drop duplicates, tokenise, and write a corpus to train on.

    A source is a file (.txt .md .py .jsonl .json .parquet and more, also .gz and .zst), a folder,
    a dataset of the Hugging Face hub (hf://owner/name[/config][:split]) or python://stdlib. What
    cannot be read is counted and listed in quarantine.jsonl, and never ends the build.
    """
    from solollm.data.build import build_corpus
    from solollm.data.canaries import Canaries
    from solollm.data.intake import Screening
    from solollm.data.items import Limits
    from solollm.data.likeness import Like
    from solollm.tokenizer import Tokenizer

    limits = Limits(
        max_document_chars=max_document_chars, max_ratio=max_ratio, text_fields=text_fields
    )
    with shown_progress(hidden=as_json) as progress:
        report = build_corpus(
            sources, out, tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
            vocab_size=vocab_size, validation_fraction=validation_fraction,
            split_rule=split_rule, near_duplicates=near_duplicates,
            like=Like(like, like_share) if like else None,
            screening=Screening(decontaminate, languages, private, quality),
            canaries=Canaries(canaries, canary_seed) if canaries else None, limits=limits,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    show_built(report, out, as_json=as_json)


@command.command("report", epilog="\b\nExample:\n  solollm data report corpora/mine --verify")
@click.argument("corpus", type=_CORPUS)
@click.option("--examples", type=int, default=2, show_default=True, help="Per reason.")
@click.option("--verify", is_flag=True, help="Also compare every byte with the index.")
@_JSON
def report(corpus: Path, examples: int, verify: bool, as_json: bool) -> None:
    """What the build of CORPUS kept and what it did not, and why."""
    from solollm.data.report import read_report, render_report
    from solollm.data.shards import verify_corpus

    found = read_report(corpus)
    if verify:
        verify_corpus(corpus)
    if as_json:
        print_json({**found.model_dump(mode="json"), "verified": verify})
        return
    print_text(render_report(found, examples=examples))
    if verify:
        print_text("\nevery byte matches the index")


@command.command(
    "inspect",
    epilog="\b\nExamples:\n  solollm data inspect corpora/mine --document 7\n"
    "  solollm data inspect corpora/mine --batch 0 --seq-len 128 --rows 2",
)
@click.argument("corpus", type=_CORPUS)
@_SPLIT
@click.option("--document", type=click.IntRange(min=0), default=0, help="First one to show.")
@click.option("--count", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--batch", "step", type=click.IntRange(min=0), help="Show this step's rows instead.")
@click.option("--seq-len", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--rows", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the rows' order.")
@_JSON
def inspect(
    *, corpus: Path, split: Literal["train", "validation"], document: int, count: int,
    step: int | None, seq_len: int, rows: int, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Show documents of CORPUS, or the rows of a training step with their document borders."""
    from solollm.data.inspection import view_batch, view_documents

    if step is None:
        documents = view_documents(corpus, split=split, first=document, count=count)
        if as_json:
            print_json([view._asdict() for view in documents])
            return
        for view in documents:
            kind = ", a planted canary" if view.canary else ""
            print_text(f"--- document {view.number}: {view.tokens:,} tokens{kind}\n{view.text}")
        return
    views = view_batch(corpus, step, split=split, seq_len=seq_len, batch_size=rows, seed=seed)
    if as_json:
        print_json([view._asdict() for view in views])
        return
    for row in views:
        print_text(f"=== step {step}, row {row.row}: {row.targets} targets")
        print_text("\n--- border ---\n".join(row.pieces))
