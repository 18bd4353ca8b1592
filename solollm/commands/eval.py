"""`solollm eval`: the terminal skin of `solollm.evaluation`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from solollm.commands import console, print_json, print_table
from solollm.commands.eval_memorisation import memorisation

if TYPE_CHECKING:
    from rich.console import Console

    from solollm.evaluation.harness import Benchmark
    from solollm.evaluation.latency import Latency
    from solollm.evaluation.report import Evaluation
    from solollm.guard.measurement import GuardReport

_EPILOG = """\b
Examples:
  solollm eval runs/first                               (bits per byte, on what the corpus held out)
  solollm eval runs/first --text notes.txt --latency
  solollm eval runs/first --mmlu data/mmlu --gsm8k data/gsm8k/test.jsonl
  solollm eval runs/first --task arc_easy --limit 200   (lm-eval downloads it)
"""


class EvalGroup(click.Group):
    """`solollm eval RUN` measures a model; what is measured otherwise is a subcommand."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["model", *args]
        return super().parse_args(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self.commands.get(cmd_name, self.commands["model"])


@click.group("eval", cls=EvalGroup)
def command() -> None:
    """Measure a model (the default), what it has memorised, or the guard of the server.

    \b
    Example:
      solollm eval runs/first
      solollm eval memorisation runs/first
      solollm eval guard
    """


command.add_command(memorisation)


@command.command("model", epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path), metavar="RUN_OR_CHECKPOINT")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path),
              help="Bits per byte of this file or folder.")  # fmt: skip
@click.option("--max-bytes", type=click.IntRange(0), default=1_000_000, show_default=True,
              help="Of each text; 0: all.")  # fmt: skip
@click.option("--mmlu", type=click.Path(path_type=Path), help="MMLU, 5 shots, from this folder.")
@click.option("--gsm8k", type=click.Path(path_type=Path), help="GSM8K, 8 shots, from this file.")
@click.option("--task", "tasks", multiple=True, help="A task or group of lm-eval, by name.")
@click.option("--limit", type=click.IntRange(0), default=0,
              help="Items of each benchmark; 0: all.")  # fmt: skip
@click.option("--shots", type=click.IntRange(0), help="Examples per prompt. Default: the task's.")
@click.option("--chat", is_flag=True, help="Ask through the model's chat template.")
@click.option("--system", default="", help="System prompt, with --chat.")
@click.option("--bos/--no-bos", "add_bos", default=None,
              help="Begin prompts with bos. Default: as the tokenizer's files say.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=1234, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--backend", default="auto", show_default=True, help="auto, or a backend's name.")
@click.option("--latency", is_flag=True, help="Milliseconds per token, bandwidth, energy.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
              default="auto", show_default=True)  # fmt: skip
@click.option("--log-samples", type=click.Path(path_type=Path),
              help="Write every prompt, answer and metric here, as JSON lines.")  # fmt: skip
@click.option("--no-save", is_flag=True, help="Do not write the result into the run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def eval_model(model: Path, as_json: bool, no_save: bool, log_samples: Path | None,
            **asked: Any) -> None:  # fmt: skip
    """Measure a model: bits per byte, MMLU, GSM8K, and whatever lm-evaluation-harness knows.

    A run folder stands for its newest intact checkpoint. The result is printed beside published
    figures, and stored in the run. `solollm eval memorisation` says what of its corpus a model has
    memorised, `solollm eval guard` measures the server's guard.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; this command shows its own
    from solollm.evaluation.harness import HarnessOptions
    from solollm.evaluation.report import EvalOptions, evaluate, save_evaluation

    options = EvalOptions(
        texts=asked["texts"], max_bytes=asked["max_bytes"], benchmarks=_benchmarks(asked),
        harness=HarnessOptions(
            limit=asked["limit"], num_shots=asked["shots"], chat_template=asked["chat"],
            system=asked["system"], add_bos=asked["add_bos"], seed=asked["seed"],
        ),
        latency=asked["latency"], backend=asked["backend"], batch_size=asked["batch_size"],
        dtype=asked["dtype"],
    )  # fmt: skip
    terminal = console(stderr=True)
    with terminal.status("opening the model") as status:

        def tell(kind: str, done: int, total: int) -> None:
            status.update(f"{kind}: {done:,} of {total:,}")

        evaluation = evaluate(model, options, tell=tell)
    stored = None if no_save else save_evaluation(evaluation)
    if log_samples is not None:
        _write_samples(evaluation, log_samples)
    if as_json:
        print_json({**evaluation.document, "stored": stored})
    else:
        show_evaluation(evaluation, console())
        if stored is not None:
            console().print(f"stored in {stored}", soft_wrap=True)


@command.command()
@click.option("--count", type=click.IntRange(1), default=500, show_default=True,
              help="Texts of each class, with a find and without.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@click.pass_context
def guard(ctx: click.Context, count: int, seed: int, as_json: bool) -> None:
    """What the server's guard finds, what it takes for something else, and what it costs.

    \b
    Example:
      solollm eval guard
    """
    from solollm.guard.measurement import measure_guard

    terminal = console(stderr=True)
    with terminal.status("measuring") as status:
        report = measure_guard(count, seed, tell=status.update)
    if as_json:
        print_json(report.document())
    else:
        _show_guard(report, console())
    ctx.exit(0 if report.holds else 1)


def _show_guard(report: GuardReport, terminal: Console) -> None:
    rows = [
        (
            score.name, f"{score.recall:.1%}", f"{score.false_rate:.1%}",
            f"{score.num_finds:,}", f"{score.num_benign:,}", "yes" if score.holds else "NO",
        )
        for score in report.classes
    ]  # fmt: skip
    columns = ("class", "recall", "false alarms", "finds", "benign", "holds")
    print_table(terminal, columns, rows)
    cost = report.latency
    terminal.print(
        f"added per chunk: {cost.mean_ms:.3f} ms on average, {cost.p99_ms:.3f} ms at the 99th"
        f" percentile, {cost.max_ms:.2f} ms at most, of {cost.num_chunks:,}", soft_wrap=True,
    )  # fmt: skip
    for chunk in () if cost.holds else cost.slowest:
        terminal.print(
            f"slow: {chunk.ms:.2f} ms, mostly {chunk.filter}, after {chunk.text!r}",
            style="dim", markup=False,
        )  # fmt: skip
    for score in report.classes:
        for text in score.missed if not score.holds else ():
            terminal.print(f"missed, {score.name}: {text!r}", style="dim", markup=False)
        for text in score.alarms if not score.holds else ():
            terminal.print(f"false alarm, {score.name}: {text!r}", style="dim", markup=False)


def _benchmarks(asked: dict[str, Any]) -> tuple[Benchmark, ...]:
    from solollm.errors import ConfigError
    from solollm.evaluation.harness import Benchmark

    local = [("mmlu", asked["mmlu"]), ("gsm8k_cot", asked["gsm8k"])]
    found = [Benchmark(name, path) for name, path in local if path is not None]
    found += [Benchmark(name) for name in asked["tasks"]]
    names = [benchmark.name for benchmark in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is asked for twice", fix="name each benchmark once")
    return tuple(found)


def show_evaluation(evaluation: Evaluation, terminal: Console) -> None:
    """Tables: bits per byte, every score with its interval, and the rows that are quoted."""
    for note in evaluation.notes:
        terminal.print(note, style="dim", markup=False, soft_wrap=True)
    if evaluation.texts:
        _show_texts(evaluation, terminal)
    if evaluation.latency is not None:
        _show_latency(evaluation.latency, terminal)
    if evaluation.benchmarks is not None:
        _show_scores(evaluation, terminal)
        _show_beside_quoted(evaluation, terminal)
    for found in evaluation.contamination:
        terminal.print(found.sentence, markup=False, soft_wrap=True)


def _show_texts(evaluation: Evaluation, terminal: Console) -> None:
    rows = [
        (
            score.name + ("" if score.is_whole else " (its beginning)"),
            f"{score.bits_per_byte:.4f}", _interval(score.interval, "{:.4f}"),
            f"{score.num_documents:,}", f"{score.num_bytes:,}",
        )
        for score in evaluation.texts
    ]  # fmt: skip
    print_table(terminal, ("text", "bits per byte", "95%", "documents", "bytes"), rows)


def _show_scores(evaluation: Evaluation, terminal: Console) -> None:
    assert evaluation.benchmarks is not None
    rows = [
        (
            f"{score.benchmark}, {score.metric}", f"{score.num_shots}", f"{100 * score.value:.1f}",
            _interval((100 * score.interval[0], 100 * score.interval[1]), "{:.1f}"),
            f"{score.num_items:,}" + ("" if score.is_whole else " of more"), score.version,
        )
        for score in evaluation.benchmarks.scores
    ]  # fmt: skip
    print_table(terminal, ("benchmark", "shots", "score", "95%", "items", "version"), rows)


def _show_beside_quoted(evaluation: Evaluation, terminal: Console) -> None:
    """The two headline scores beside published ones; nothing where neither was measured."""
    from solollm.evaluation.quoted import LEGEND, QUOTED_ROWS
    from solollm.evaluation.report import headline

    found = headline(evaluation.document)
    if not found:
        return
    rows = [
        (
            row.model,
            row.training,
            *map(_number, (row.mmlu_5_shot, row.gsm8k_8_shot, row.ms_per_token)),
            row.source,
        )
        for row in QUOTED_ROWS
    ]
    ours = [found.get(key, "") for key in ("mmlu", "gsm8k_cot", "ms_per_token")]
    name = f"{evaluation.checkpoint.name}, {evaluation.parameters / 1e6:,.1f}M"
    rows.append((name, "", *ours, "here"))
    print_table(terminal, ("model", "training", "MMLU 5", "GSM8K 8", "ms/token", "from"), rows)
    terminal.print(LEGEND, style="dim")


def _show_latency(latency: Latency, terminal: Console) -> None:
    rows = [
        (
            f"{speed.batch_size}", f"{speed.prefill_ms_per_token:.3f}",
            f"{speed.decode_ms_per_token:.2f}", f"{speed.decode_cpu_ms_per_token:.2f}",
            f"{speed.tokens_per_second:,.1f}",
        )
        for speed in latency.speeds
    ]  # fmt: skip
    columns = ("batch", "prefill ms/token", "decode ms/token", "CPU ms/token", "tokens/s")
    print_table(terminal, columns, rows)
    share = "the backend measures no memory bandwidth"
    if latency.bandwidth_share is not None:
        share = (
            f"{latency.bytes_per_token / 1e6:,.1f} MB read per token: {latency.bandwidth_share:.0%}"
            f" of the {latency.copy_bytes_per_second / 1e9:,.1f} GB/s that copying reaches here"
        )
    energy = latency.energy.reason
    if latency.joules_per_token is not None:
        energy = f"{latency.joules_per_token:.3f} J per new token, by {latency.energy.source}"
    terminal.print(f"batch 1: {share}\nenergy: {energy}", soft_wrap=True)


def _interval(interval: tuple[float, float] | None, shape: str) -> str:
    return "" if interval is None else " - ".join(shape.format(end) for end in interval)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _write_samples(evaluation: Evaluation, path: Path) -> None:
    from solollm.durable import replace_file

    lines = [
        json.dumps({"task": task, **sample}, ensure_ascii=False, default=str)
        for task, samples in evaluation.samples.items()
        for sample in samples
    ]
    replace_file(path, "".join(line + "\n" for line in lines).encode("utf-8", "replace"))
