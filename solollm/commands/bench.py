"""`solollm bench`: speed on this machine, beside the other stacks installed on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.table import Table

from solollm.commands import console, print_json

if TYPE_CHECKING:
    from solollm.benchmark import TrainBenchmark


@click.group()
def command() -> None:
    """Measure speed on this machine, beside the other stacks installed on it.

    \b
    Example:
      solollm bench train
    """


@command.command()
@click.option("--backend", default="auto", show_default=True, help="auto, or a backend's name.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=2), default=256, show_default=True)
@click.option("--depth", type=int, default=None, help="The dial's model instead of the 17M one.")
@click.option("--stack", "stacks", multiple=True, help="Only these peers. Default: all installed.")
@click.option("--alone", is_flag=True, help="No peers.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def train(
    backend: str, rounds: int, batch_size: int, seq_len: int, depth: int | None,
    stacks: tuple[str, ...], alone: bool, as_json: bool,
) -> None:  # fmt: skip
    """Training speed against the matrix-multiply rate and the peers installed here.

    \b
    Example:
      solollm bench train
      solollm bench train --depth 6 --alone
    """
    from solollm.benchmark import DEFAULT_MODEL, bench_train
    from solollm.dial import from_depth
    from solollm.registry import select_backend

    model = DEFAULT_MODEL if depth is None else from_depth(depth, DEFAULT_MODEL.vocab_size)
    terminal = console(stderr=True)
    with terminal.status("starting") as status:
        measured = bench_train(
            select_backend(backend).backend, model=model, batch_size=batch_size, seq_len=seq_len,
            rounds=rounds, stacks=() if alone else (stacks or None), tell=status.update,
        )  # fmt: skip
    if as_json:
        print_json(measured.to_json())
    else:
        _show(measured)


def _show(measured: TrainBenchmark) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("stack", "tokens/CPU-s", "tokens/s", "of GEMM", "ours / it", "loss"):
        table.add_column(name, justify="left" if name == "stack" else "right")
    for stack in measured.stacks:
        ours = stack is measured.stacks[0]
        table.add_row(
            stack.name, f"{stack.tokens_per_cpu_second:,.0f}", f"{stack.tokens_per_second:,.0f}",
            f"{stack.share_of_gemm:.0%}", "" if ours else f"{measured.ratio(stack.name):.2f}x",
            "equal" if stack.is_same else f"differs {stack.loss_deviation:.1e}",
        )  # fmt: skip
    terminal = console()
    versions = ", ".join(f"{name} {value}" for name, value in measured.versions.items())
    terminal.print(
        f"{measured.backend} on {measured.device}, {measured.threads} threads, {versions}; batch"
        f" {measured.batch_size} x {measured.seq_len}, fp32, AdamW, median of {measured.rounds};"
        f" GEMM {measured.gemm_flops_per_cpu_second / 1e9:.0f} GFLOP per CPU-second"
    )
    terminal.print(table)
