"""`solollm eval memorisation`: the terminal skin of `solollm.evaluation.memorisation`."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from solollm.commands import console, print_json, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from solollm.evaluation.canaries import CanaryGroup, CanaryResult
    from solollm.evaluation.memorisation import Memorisation
    from solollm.evaluation.verbatim import Reproduction

_NEVER = "never (controls)"
_EPILOG = """\b
Examples:
  solollm data build notes/ --out corpora/marked --canaries 60
  solollm pretrain --corpus corpora/marked --run runs/marked
  solollm eval memorisation runs/marked
  solollm eval memorisation runs/tuned --corpus corpora/marked   (its base's)
"""


@click.command(epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path), metavar="RUN_OR_CHECKPOINT")
@click.option("--corpus", type=click.Path(path_type=Path), help="Default: the run's own.")
@click.option("--candidates", type=click.IntRange(1000), default=4096, show_default=True,
              help="Other numbers that a canary is ranked among.")  # fmt: skip
@click.option("--passages", type=click.IntRange(0), default=200, show_default=True,
              help="To continue, of each split; 0: none.")  # fmt: skip
@click.option("--prefix-tokens", type=click.IntRange(1), default=50, show_default=True,
              help="Of a passage, given.")  # fmt: skip
@click.option("--continuation-tokens", type=click.IntRange(1), default=50, show_default=True,
              help="Of a passage, to be continued with.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
              help="Which passages are drawn.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--backend", default="auto", show_default=True, help="auto, or a backend's name.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
              default="auto", show_default=True)  # fmt: skip
@click.option("--no-save", is_flag=True, help="Do not write the result into the run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def memorisation(
    model: Path, as_json: bool, no_save: bool, candidates: int, passages: int, **asked: Any
) -> None:
    """What a model has memorised of its corpus.

    Canaries (`solollm data build --canaries 60`): the exposure of each, that is log2 of the number
    of candidates less log2 of its rank among them by perplexity, beside numbers that never were
    planted. And passages of the corpus: how many the model continues word for word, beside held-out
    ones. A run folder stands for its newest intact checkpoint; the result is stored in the run.
    """
    from solollm.evaluation.memorisation import MemorisationOptions, measure_memorisation

    options = MemorisationOptions(num_candidates=candidates, num_passages=passages, **asked)
    terminal = console(stderr=True)
    with terminal.status("opening the model") as status:

        def tell(kind: str, done: int, total: int) -> None:
            status.update(f"{kind}: {done:,} of {total:,}")

        found = measure_memorisation(model, options, tell=tell)
    stored = None if no_save else found.save()
    if as_json:
        print_json({**found.document, "stored": stored})
        return
    _show(found, console())
    if stored is not None:
        console().print(f"stored in {stored}", soft_wrap=True)


def _show(found: Memorisation, terminal: Console) -> None:
    for note in found.notes:
        terminal.print(note, style="dim", markup=False, soft_wrap=True)
    if found.canaries is not None:
        _show_canaries(found.canaries, terminal)
    if found.passages:
        _show_passages(found.passages, terminal)
    for sentence in found.meaning:
        terminal.print(sentence, markup=False, soft_wrap=True)


def _show_canaries(result: CanaryResult, terminal: Console) -> None:
    columns = ("canaries planted", "count", "exposure", "median", "least - most", "first", "chance")
    print_table(terminal, columns, [_row(group) for group in result.groups])
    terminal.print(
        f"exposure: mean bits among {result.num_candidates:,} candidates, which show at most"
        f" {result.resolution:.1f}; 1.4 is that of numbers never seen\n"
        "first: likelier than every candidate; chance: that numbers never seen come to as much",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    extrapolated = [
        f"{group.extrapolated:.1f} ({_planted(group)})"
        for group in result.groups
        if group.extrapolated is not None
    ]
    if extrapolated and result.law is not None:
        terminal.print(
            f"beyond these candidates, extrapolated by a skew-normal distribution that"
            f" {_fits(result.law.fit)} theirs: {', '.join(extrapolated)}", soft_wrap=True,
        )  # fmt: skip


def _fits(fit: float) -> str:
    return f"fits (p = {fit:.2g})" if fit >= 0.1 else f"fits badly (p = {fit:.1g})"


def _planted(group: CanaryGroup) -> str:
    return {0: _NEVER, 1: "once"}.get(group.repeats, f"{group.repeats} times")


def _row(group: CanaryGroup) -> tuple[str, ...]:
    bits = group.bits
    return (
        _planted(group), f"{len(bits)}", f"{group.mean:.2f}", f"{median(bits):.2f}",
        f"{min(bits):.1f} - {max(bits):.1f}", f"{group.num_first}",
        f"{group.chance:.2g}" if group.chance >= 1e-6 else "< 1e-6",
    )  # fmt: skip


def _show_passages(passages: tuple[Reproduction, ...], terminal: Console) -> None:
    first = passages[0]
    names = {"train": "training", "validation": "held out"}
    rows = [
        (
            names[found.split], f"{len(found.matching)}", f"{found.share:.1%}",
            f"{found.interval[0]:.1%} - {found.interval[1]:.1%}", f"{found.mean_matching:.2f}",
            f"{max(found.matching)}",
        )
        for found in passages
    ]  # fmt: skip
    columns = ("passages", "count", "word for word", "95%", "matching tokens", "most")
    print_table(terminal, columns, rows)
    terminal.print(
        f"word for word: {first.prefix_tokens} tokens given, and the next"
        f" {first.continuation_tokens} come out; matching tokens: before the first wrong one, mean",
        style="dim", soft_wrap=True,
    )  # fmt: skip
