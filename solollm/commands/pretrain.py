"""`solollm pretrain`: the skin of `solollm.pretraining.pretrain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from solollm.commands import Number, console, print_json
from solollm.commands.supervised import is_supervised, supervise, supervised_option
from solollm.errors import quoted

if TYPE_CHECKING:
    from solollm.config import RunConfig
    from solollm.pretraining import Preparation
    from solollm.run_log import Sink
    from solollm.workload import TrainResult

_EPILOG = """\b
Examples:
  solollm pretrain --corpus corpora/mine --run runs/first --depth 4
  solollm pretrain --corpus corpora/mine --run runs/night --hours 8
  solollm pretrain --config small.toml --run runs/second --set train.seed=1
  solollm pretrain --corpus corpora/mine --preset 125m --dry-run
\b
Stop it with Ctrl-C: it saves, and `solollm resume` goes on.
"""
# Flag -> the setting it stands for; --set has the last word.
_WORTH_SAYING = 4 << 30  # bytes of a corpus that take some seconds to read
_SHORTCUTS = {
    "corpus": "data.corpus",
    "preset": "model.preset",
    "depth": "model.depth",
    "hours": "train.hours",
    "init_from": "train.init_from",
}


@click.command("pretrain", epilog=_EPILOG)
@click.option("--run", type=click.Path(path_type=Path), help="Folder of the new run.")
@click.option("--corpus", type=click.Path(), help="Folder that `solollm data build` made.")
@click.option("--preset", help="Model by name: 15m, 125m, 350m, 1.3b, 2.7b, 7b.")
@click.option("--depth", type=int, help="Model by one number, its layers; the default is 4.")
@click.option(
    "--hours", type=Number(min=0, min_open=True), help="How long; alone it also chooses the model."
)
@click.option("--init-from", type=click.Path(), help="Checkpoint whose weights to start from.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help=".toml or .yaml")
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Any setting.")
@click.option("--backend", default="auto", show_default=True, help="auto, or the name of one.")
@supervised_option
@click.option("--dry-run", is_flag=True, help="Show what would be done; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON per row instead.")
def command(
    run: Path | None, config_path: Path | None, overrides: tuple[str, ...], backend: str,
    dry_run: bool, as_json: bool, supervised: bool | None, **shortcuts: Any,
) -> None:  # fmt: skip
    """Train a model from scratch, or from a checkpoint's weights.

    What is left open is chosen: the model by depth 4, batch, learning rate and length by the
    model, micro-batch and precision by this machine's memory.
    """
    from solollm.config import load_config
    from solollm.pretraining import prepare, pretrain

    given = [
        f"{_SHORTCUTS[name]}={json.dumps(value)}"
        for name, value in shortcuts.items()
        if value is not None
    ]
    config = load_config(config_path, [*given, *overrides])
    if dry_run or not is_supervised(supervised):
        say_measuring(config, as_json=as_json)
    if dry_run:
        show_preparation(prepare(config, backend=backend), as_json=as_json)
        return
    if run is None:
        raise click.UsageError("give the new run a folder: --run runs/NAME")
    if is_supervised(supervised):
        words = ["--backend", backend, *(["--json"] if as_json else [])]
        place = ["--config", str(config_path)] if config_path else []
        settings = [word for item in (*given, *overrides) for word in ("--set", item)]
        supervise(
            run, ["pretrain", "--run", str(run), *place, *settings, *words],
            ["resume", str(run), *words],
        )  # fmt: skip
        return
    say_reading(config, as_json=as_json)
    result = pretrain(config, run, backend=backend, sinks=[sink_for(as_json=as_json)])
    if not as_json and result.rank == 0:
        show_result(result)


def sink_for(*, as_json: bool) -> Sink:
    """What watches a run on this terminal."""
    from solollm.report.console import ConsoleSink, JsonSink

    return JsonSink() if as_json else ConsoleSink(console())


def say(text: str) -> None:
    """Print a line as it is: no markup, no line breaks of the terminal's width."""
    console().print(text, markup=False, soft_wrap=True)


def say_measuring(config: RunConfig, *, as_json: bool) -> None:
    """Say, on standard error, what takes a while before a run of some hours begins."""
    table = config.train
    if table.hours is None or table.steps is not None or table.tokens is not None or as_json:
        return
    text = f"measuring steps on this machine, to know what fits into {table.hours:g} hours"
    console(stderr=True).print(text, markup=False, soft_wrap=True)


def say_reading(config: RunConfig, *, as_json: bool, corpus: Path | None = None) -> None:
    """Say, on standard error, that a large corpus is read once before the first step. `corpus`:
    where it lies now, if not where the config says."""
    from solollm.errors import SoloLLMError
    from solollm.planner import format_bytes
    from solollm.run_streams import corpora_bytes

    if as_json or config.finetune is not None:
        return
    try:
        size = corpora_bytes(config, corpus)
    except (SoloLLMError, OSError):  # the run itself says what is wrong
        return
    if size >= _WORTH_SAYING:
        text = f"reading the corpus once, {format_bytes(size)}: it must be what was built"
        console(stderr=True).print(text, markup=False, soft_wrap=True)


def show_result(result: TrainResult) -> None:
    """Print how a run ended, and what to type next."""
    from solollm.runs import Run

    held_out = ""
    if result.bits_per_byte is not None:
        held_out = f", held-out {result.bits_per_byte:.3f} bits per byte"
    say(f"finished {result.run}: step {result.step:,}{held_out}")
    say(f"weights  {result.checkpoint}")
    say(f"curves   {result.run / 'report.html'}")
    is_tuned = Run.open(result.run).config.finetune is not None
    run = quoted(result.run)
    told = f"chat {run}" if is_tuned else f'generate {run} "Once upon a time"'
    say(f"next     solollm {told}")


def show_preparation(prepared: Preparation, *, as_json: bool) -> None:
    """Print what a run would be."""
    from solollm.planner import format_bytes

    shape, plan, steps = prepared.shape, prepared.plan, prepared.config.train.steps or 0
    if as_json:
        print_json(
            {
                "config": prepared.config.model_dump(mode="json", exclude_none=True),
                "backend": prepared.backend.name,
                "num_parameters": shape.model.num_parameters(),
                "steps": steps,
                "tokens_per_step": shape.tokens_per_step,
                "micro_batch_size": plan.micro_batch_size,
                "activation_checkpointing": plan.activation_checkpointing,
                "compute_dtype": plan.compute_dtype,
                "memory_bytes": dict(plan.memory_bytes),
                "memory_limit_bytes": plan.memory_limit_bytes,
            }
        )
        return
    model, total = shape.model, sum(plan.memory_bytes.values())
    rows = {
        "backend": prepared.selected.reason,
        "model": f"{model.num_parameters():,} parameters: {model.num_hidden_layers} layers,"
        f" {model.hidden_size} wide, {model.vocab_size:,} ids",
        "batch": f"{shape.batch_size} rows of {shape.seq_len} tokens, {plan.micro_batch_size} at"
        f" once, {plan.compute_dtype}"
        + (", activation checkpointing" if plan.activation_checkpointing else ""),
        "length": f"{steps:,} steps, {steps * shape.tokens_per_step:,} tokens",
        "learning rate": f"{shape.lr:g}, {prepared.config.schedule.name}",
        "memory": f"{format_bytes(total)} of {format_bytes(plan.memory_limit_bytes)}",
    }
    for name, value in rows.items():
        say(f"{name:14} {value}")
