"""`solollm finetune`: the skin of `solollm.finetune.tuning.finetune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from solollm.commands import Number, console, print_json
from solollm.commands.pretrain import say, say_measuring, show_result, sink_for
from solollm.errors import printable

if TYPE_CHECKING:
    from solollm.finetune.check import Findings
    from solollm.finetune.dataset import Reading
    from solollm.finetune.rendering import Rendered
    from solollm.tokenizer import Tokenizer

_EPILOG = """\b
Examples:
  solollm finetune runs/first --data chats.jsonl --check
  solollm finetune runs/first --data chats.jsonl --run runs/tuned
  solollm finetune models/qwen --data train.jsonl --held-out test.jsonl --method qlora --run runs/q
  solollm finetune runs/first --data chats.jsonl --method full --epochs 3 --run runs/whole
\b
Rows are messages, prompt/completion, question/answer, Alpaca, ShareGPT or preference pairs, as
.jsonl, .json, .parquet or hf://owner/name. Stop it with Ctrl-C: `solollm resume` goes on.
"""
# Flag -> the setting it stands for; --set has the last word.
_SHORTCUTS = {
    "data": "finetune.data",
    "held_out": "finetune.held_out",
    "method": "finetune.method",
    "template": "finetune.template",
    "epochs": "finetune.epochs",
    "rank": "finetune.adapter.rank",
}
_SHOWN_SAMPLES, _SHOWN_PROBLEMS = 3, 20


@click.command("finetune", epilog=_EPILOG)
@click.argument("base", metavar="BASE")
@click.option("--data", multiple=True, help="File, folder or hf://owner/name; may be repeated.")
@click.option("--held-out", multiple=True, help="The same, to measure on; default: 5% of --data.")
@click.option("--run", type=click.Path(path_type=Path), help="Folder of the new run.")
@click.option("--method", type=click.Choice(["full", "lora", "qlora"]), help="Default: lora.")
@click.option("--rank", type=int, help="Of the adapter; default 16.")
@click.option(
    "--epochs", type=Number(min=0, min_open=True), help="Passes over the data; default 1."
)
@click.option("--template", type=click.Path(), help="Jinja chat template; default: the base's.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help=".toml or .yaml")
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Any setting.")
@click.option("--backend", default="auto", show_default=True, help="auto, or the name of one.")
@click.option(
    "--check", is_flag=True, help="Show samples with what is trained marked; no training."
)
@click.option("--json", "as_json", is_flag=True, help="One line of JSON per row instead.")
def command(
    base: str, run: Path | None, config_path: Path | None, overrides: tuple[str, ...],
    backend: str, check: bool, as_json: bool, **shortcuts: Any,
) -> None:  # fmt: skip
    """Teach a model to answer, on rows of conversations.

    BASE is a run (its newest intact checkpoint), a checkpoint or an imported model. Loss is taken
    only on what the assistant says, its end of turn included.
    """
    from solollm.errors import DataError
    from solollm.finetune.tuning import finetune_config, look, prepare_tuning, start

    given = [f"train.init_from={json.dumps(base)}"]
    given += [
        f"{_SHORTCUTS[name]}={json.dumps(value)}"
        for name, value in shortcuts.items()
        if value not in (None, ())
    ]
    config = finetune_config(config_path, [*given, *overrides])
    if check:
        reading, findings = look(config)
        show_check(reading, findings, as_json=as_json)
        click.get_current_context().exit(DataError.exit_code if findings.faults else 0)
    if run is None:
        raise click.UsageError("give the new run a folder: --run runs/NAME (or --check)")
    prepared = prepare_tuning(config)
    if not as_json:
        show_findings(prepared.findings)
    say_measuring(config, as_json=as_json)
    result = start(prepared, run, backend=backend, sinks=[sink_for(as_json=as_json)])
    if not as_json:
        show_result(result)


def show_findings(findings: Findings) -> None:
    """Print what the rows are."""
    shapes = ", ".join(f"{count:,} {shape}" for shape, count in findings.shapes.items()) or "none"
    say(f"rows        {shapes}")
    say(f"samples     {findings.num_train:,} to train on, {findings.num_held_out:,} held out")
    lengths = f"the longest sample has {findings.longest:,}, a row {findings.seq_len:,}"
    # GRPO learns from answers of its own, and only compares them with these.
    use = "of right answers" if findings.objective == "grpo" else "trained"
    say(f"tokens      {findings.num_targets:,} {use}; {lengths}")
    if findings.truncated:
        say(f"too long    {findings.truncated:,} samples")
    for warning in findings.warnings:
        say(f"WARNING     {warning}")


def show_check(reading: Reading, findings: Findings, *, as_json: bool) -> None:
    """Print samples with the trained tokens marked, and everything that was found."""
    from solollm.finetune.dataset import folded

    if as_json:
        print_json(findings.as_json())
        return
    for one in reading.laid[:_SHOWN_SAMPLES]:
        say(f"--- {printable(one.place)}")
        names = ("",) if len(one.samples) == 1 else ("chosen", "rejected")
        for name, sample in zip(names, one.samples, strict=True):
            if name:
                say(f"{name}:")
            show_sample(sample, reading.tokenizer)
    show_findings(findings)
    lines = folded(findings.problems)
    for line in lines[:_SHOWN_PROBLEMS]:
        say(f"bad row     {printable(line)}")
    if len(lines) > _SHOWN_PROBLEMS:
        say(f"            {len(lines) - _SHOWN_PROBLEMS:,} other reasons; --json lists every row")
    for fault in findings.faults:
        say(f"FAULT       {printable(fault)}")
    if not findings.faults:
        say("sound       every answer ends in a trained end of turn; tokenizer, template and"
            " generation config agree on it")  # fmt: skip


def show_sample(sample: Rendered, tokenizer: Tokenizer) -> None:
    """Print one sample as it is trained on; what carries loss is green, or between » and «."""
    from rich.text import Text

    target, text = console(), Text()
    for ids, is_trained in _runs(sample):
        piece = printable(tokenizer.decode(ids, skip_special=False))
        if is_trained:
            text.append(piece if target.color_system else f"»{piece}«", style="bold green")
        else:
            text.append(piece, style="dim")
    target.print(text, soft_wrap=True)


def _runs(sample: Rendered) -> list[tuple[list[int], bool]]:
    """Neighbouring tokens that carry loss, or do not, together."""
    runs: list[tuple[list[int], bool]] = []
    for token, trained in zip(sample.ids.tolist(), sample.produced.tolist(), strict=True):
        if runs and runs[-1][1] == trained:
            runs[-1][0].append(token)
        else:
            runs.append(([token], trained))
    return runs
