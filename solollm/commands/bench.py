"""`solollm bench`: speed on this machine, beside the other stacks installed on it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
from rich.table import Table

from solollm.commands import console, print_json

if TYPE_CHECKING:
    import numpy as np

    from solollm.architecture import ModelConfig
    from solollm.backend import ComputeDType
    from solollm.benchmark import TrainBenchmark
    from solollm.text_benchmark import TextBenchmark


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
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
              default="float32", show_default=True, help="Of the arithmetic.")  # fmt: skip
@click.option("--way", "ways", multiple=True, help="To hold our model, as `solollm plan` lists it.")
@click.option("--recompute", is_flag=True, help="Our blocks computed again in the backward pass.")
@click.option("--stack", "stacks", multiple=True, help="Only these peers. Default: all installed.")
@click.option(
    "--text", default="", help="Documents of their own lengths: a .jsonl or text file, or `stdlib`."
)
@click.option("--longest", type=click.IntRange(min=2), default=2048, help="With --text: cut here.")
@click.option("--alone", is_flag=True, help="No peers.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def train(
    backend: str, rounds: int, batch_size: int, seq_len: int, depth: int | None, dtype: str,
    ways: tuple[str, ...], recompute: bool, stacks: tuple[str, ...], text: str, longest: int,
    alone: bool, as_json: bool,
) -> None:  # fmt: skip
    """Training speed, memory and copies, beside what this machine can and the peers here.

    Speed as a share of the matrix-multiply rate of the same minutes and of the datasheet's peak;
    with several --way all of them in turn, the bytes that each copies per step, and how far the
    copies run beside the computation. What a processor cannot say is left out.

    \b
    Example:
      solollm bench train
      solollm bench train --depth 6 --alone
      solollm bench train --alone --way resident --way streaming --recompute
      solollm bench train --backend mlx --text train.jsonl --batch-size 4

    With --text every stack reads the same documents: a peer in batches of its own making of
    --batch-size documents, ours packed into full rows. Useful tokens and peak memory are compared.
    """
    from solollm.benchmark import DEFAULT_MODEL, RESIDENT, Work, bench_train, ways_by_name
    from solollm.dial import from_depth
    from solollm.dtype_choice import preferred_dtype
    from solollm.registry import select_backend
    from solollm.text_benchmark import bench_text

    model = DEFAULT_MODEL if depth is None else from_depth(depth, DEFAULT_MODEL.vocab_size)
    chosen = select_backend(backend).backend
    wanted = () if alone else (stacks or None)
    terminal = console(stderr=True)
    if text:
        with terminal.status("reading") as status:
            documents = _documents(text, model, longest, 4 * batch_size * (rounds + 1))
            read = bench_text(
                chosen, documents, model=model, batch_size=batch_size, rounds=rounds,
                stacks=wanted, tell=status.update,
            )  # fmt: skip
        if as_json:
            print_json(read.to_json())
        else:
            _show_text(read)
        return
    compute = preferred_dtype(chosen.capabilities()) if dtype == "auto" else dtype
    work = Work(model, batch_size, seq_len, cast("ComputeDType", compute), recompute)
    with terminal.status("starting") as status:
        measured = bench_train(
            chosen, work, rounds=rounds, stacks=wanted, tell=status.update,
            ways=ways_by_name(chosen, ways) or (RESIDENT,),
        )  # fmt: skip
    if as_json:
        print_json(measured.to_json())
    else:
        _show(measured)


def _documents(text: str, model: ModelConfig, longest: int, most: int) -> list[np.ndarray]:
    from solollm.text_benchmark import read_documents

    path = None if text == "stdlib" else Path(text)
    return read_documents(path, model.vocab_size, longest, most)


def _show_text(read: TextBenchmark) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("stack", "useful tokens/CPU-s", "peak MB", "speed", "memory", "loss"):
        table.add_column(name, justify="left" if name == "stack" else "right")
    for stack in read.stacks:
        is_ours = stack is read.stacks[0]
        table.add_row(
            stack.name, f"{stack.useful_tokens_per_cpu_second:,.0f}",
            f"{stack.peak_bytes / 1e6:,.0f}",
            "" if is_ours else f"ours {read.speed_ratio(stack.name):.2f}x",
            "" if is_ours else f"ours {read.memory_ratio(stack.name):.2f}x",
            f"{stack.losses[-1]:.3f}",
        )  # fmt: skip
    terminal = console()
    terminal.print(
        f"{read.backend} on {read.device}; {read.num_documents} documents of"
        f" {read.mean_document_tokens:.0f} tokens on average, {read.longest_document_tokens} at"
        f" most; ours {read.rows} x {read.seq_len}, peers {read.batch_size} documents per step;"
        f" fp32, AdamW, {len(read.stacks[0].cpu_seconds)} rounds"
    )
    terminal.print(table)


@command.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="RUN_OR_CHECKPOINT")
@click.option("--users", default="1,2,4,8,16,32,64", show_default=True, help="At once, in turns.")
@click.option("--requests", type=click.IntRange(1, 100), default=2, show_default=True,
              help="Of each user, one after the other.")  # fmt: skip
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(2), default=32, show_default=True)
@click.option("--max-batch-size", type=click.IntRange(1), default=16, show_default=True,
              help="Sequences at once, on every stack.")  # fmt: skip
@click.option("--stack", "stacks", multiple=True, help="Only these. Default: all that are here.")
@click.option("--vllm-python", type=click.Path(path_type=Path), help="An interpreter with vLLM.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def serve(
    model: Path, users: str, requests: int, new_tokens: int, prompt_tokens: int,
    max_batch_size: int, stacks: tuple[str, ...], vllm_python: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Serving one to many users, beside vLLM and mlx_lm.server where they are installed.

    All load stays on this machine. "good" are requests whose first token came within a second and
    whose tokens then came within 0.1 s of each other.

    \b
    Example:
      solollm bench serve runs/first
      solollm bench serve runs/first --users 1,8 --stack solollm-torch --json
    """
    from solollm.serving.benchmark import bench_serve
    from solollm.serving.load import Load

    counts = [int(part) for part in users.split(",") if part.strip().isdigit()]
    if len(counts) != len(users.split(",")):
        raise click.UsageError(f"--users {users!r} is not numbers with commas between")
    # Its servers end with it, whoever ends it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    terminal = console(stderr=True)
    with terminal.status("starting") as status:
        measured = bench_serve(
            model, stacks=stacks, users=counts, prompt_tokens=prompt_tokens, tell=status.update,
            load=Load(1, requests, new_tokens), max_batch_size=max_batch_size,
            vllm_python=vllm_python,
        )  # fmt: skip
    if as_json:
        print_json(measured.to_json())
        return
    table = Table(box=None, pad_edge=False)
    for name in ("stack", "users", "first p50 s", "p95", "gap p50 ms", "p95", "tokens/s",
                 "tokens/CPU-s", "good/s"):  # fmt: skip
        table.add_column(name, justify="left" if name == "stack" else "right")
    for name, results in measured.stacks.items():
        for result in results:
            table.add_row(
                name, str(result.load.users), f"{result.first(0.5):.3f}",
                f"{result.first(0.95):.3f}", f"{1e3 * result.gap(0.5):.1f}",
                f"{1e3 * result.gap(0.95):.1f}", f"{result.tokens_per_second:,.0f}",
                f"{result.tokens_per_cpu_second:,.0f}", f"{result.goodput:.2f}",
            )  # fmt: skip
    console().print(table)
    for name, why in measured.missing.items():
        console().print(f"{name}: {why}", style="yellow", markup=False)
    for name in list(measured.stacks)[1:]:
        console().print(
            f"{name} gave the text of {next(iter(measured.stacks))} in"
            f" {measured.agreement(name):.0%} of the requests", style="dim", markup=False,
        )  # fmt: skip


def _show(measured: TrainBenchmark) -> None:
    from solollm.benchmark import is_cpu

    on_cpu, terminal, work = is_cpu(measured.device), console(), measured.work
    versions = ", ".join(f"{name} {value}" for name, value in measured.versions.items())
    terminal.print(
        f"{measured.backend} on {measured.device}, {measured.threads} threads, {versions}; batch"
        f" {work.batch_size} x {work.seq_len}, {work.compute_dtype}, AdamW, median of"
        f" {measured.rounds}; GEMM {measured.ceilings.gemm_flops / 1e9:,.0f} GFLOP per"
        f" {'CPU-second' if on_cpu else 'second'}; datasheet:"
        f" {measured.ceilings.datasheet or 'none for this device and dtype'}"
    )
    speed = "tokens/CPU-s" if on_cpu else "of peak"
    table = _table("stack", speed, "tokens/s", "GEMM", "ours/it", "loss", "peak MB")
    for stack in measured.stacks:
        first = (
            f"{stack.tokens_per_cpu_second:,.0f}" if on_cpu else _share(stack.share_of_datasheet)
        )
        table.add_row(
            stack.name, first, f"{stack.tokens_per_second:,.0f}", _share(stack.share_of_gemm),
            "" if stack is measured.stacks[0] else f"{measured.ratio(stack.name):.2f}x",
            "equal" if stack.is_same else f"{stack.loss_deviation:+.0e}",
            f"{stack.peak_bytes / 1e6:,.0f}" if stack.peak_bytes else "",
        )  # fmt: skip
    terminal.print(table)
    if any(stack.planned_copied_bytes for stack in measured.stacks):
        terminal.print(_copies(measured))
    lacking = [f"{name} (needs {lacks})" for name, lacks in measured.peers.items() if lacks]
    installed = [name for name, lacks in measured.peers.items() if not lacks]
    spared = [name for name in installed if name not in measured.timed_peers]
    for title, names in (("not timed", spared), ("not possible here", lacking)):
        if names:
            terminal.print(f"{title}: {', '.join(names)}", style="dim")


def _copies(measured: TrainBenchmark) -> Table:
    """What our stacks copy per step, counted and planned."""
    table = _table("copies per step", "MB up", "planned", "MB down", "overlap")
    for stack in measured.stacks:
        if stack.planned_copied_bytes is None:
            continue
        up = down = "not counted"
        if stack.copies is not None:
            up, down = (
                f"{n / 1e6:,.1f}" for n in (stack.copies.loaded_bytes, stack.copies.stored_bytes)
            )
        planned = f"{stack.planned_copied_bytes / 1e6:,.1f}"
        table.add_row(stack.name, up, planned, down, _share(stack.overlap))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name is columns[0] else "right")
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
