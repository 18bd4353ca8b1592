"""`solollm data contamination`: a skin over `measure_overlap`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from solollm.commands import console, print_json, print_table
from solollm.commands.data_progress import print_text
from solollm.errors import printable

if TYPE_CHECKING:
    from solollm.data.decontamination import Overlap


@click.command(
    "contamination",
    epilog="\b\nExamples:\n  solollm data contamination corpora/mine data/mmlu/test\n"
    "  solollm data contamination corpora/mine hf://openai/gsm8k/main:test\n"
    "  solollm data contamination conversations.jsonl data/gsm8k/test.jsonl",
)
@click.argument("corpus", metavar="CORPUS_OR_ROWS")
@click.argument("benchmarks", nargs=-1, required=True, metavar="BENCHMARKS...")
@click.option("--examples", type=click.IntRange(0), default=5, show_default=True,
              help="Items of each benchmark to show.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def contamination(
    corpus: str, benchmarks: tuple[str, ...], examples: int, *, as_json: bool
) -> None:
    """How many items of BENCHMARKS the training text of a corpus holds, or rows for `finetune`.

    A text holds an item if 13 words in a row of it are there, or all of an item of 8 to 12 words.
    A benchmark is a file, a folder or a dataset of the Hugging Face hub. Rows are a file, a folder
    or a dataset too, of which all fields are read.
    """
    from solollm.data.decontamination import measure_overlap
    from solollm.data.inspection import document_texts
    from solollm.data.shards import INDEX_NAME
    from solollm.finetune.rows import row_texts

    is_corpus = (Path(corpus) / INDEX_NAME).is_file()
    texts = document_texts(Path(corpus), "train") if is_corpus else row_texts([corpus])
    unit = "document" if is_corpus else "row"
    with console(stderr=True).status("reading") as status:

        def told() -> Iterator[str]:
            for number, text in enumerate(texts):
                if number % 100 == 0:
                    status.update(f"{number:,} {unit}s read")
                yield text

        found = measure_overlap(benchmarks, told())
    if as_json:
        print_json([_document(overlap) for overlap in found])
        return
    columns = ("benchmark", "items", f"in {unit}s", "share", "not to be told")
    print_table(console(), columns, [_row(overlap) for overlap in found])
    for overlap in found:
        _show_examples(overlap, examples, unit)


def _row(overlap: Overlap) -> tuple[str, ...]:
    total = overlap.num_items
    return (
        overlap.source, f"{total:,}", f"{len(overlap.held):,}",
        f"{len(overlap.held) / total:.2%}" if total else "",
        f"{overlap.num_too_short + overlap.num_too_common:,}",
    )  # fmt: skip


def _show_examples(overlap: Overlap, count: int, unit: str) -> None:
    shown = sorted(overlap.held.items(), key=lambda entry: (-entry[1], entry[0]))[:count]
    for item, documents in shown:
        beginning = " ".join(overlap.beginnings[item].split())[:100]
        count_told = f"{documents:,} {unit}{'s'[: documents != 1]}"
        print_text(printable(f"{overlap.source}, in {count_told}: {beginning}"))


def _document(overlap: Overlap) -> dict[str, object]:
    return {
        "benchmark": overlap.source, "items": overlap.num_items,
        "too_short": overlap.num_too_short, "too_common": overlap.num_too_common,
        "held": [
            {"item": item, "documents": documents, "beginning": overlap.beginnings[item]}
            for item, documents in sorted(overlap.held.items())
        ],
    }  # fmt: skip
