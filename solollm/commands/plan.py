"""`solollm plan`: a training before it is begun, at 80 columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from solollm.commands import Number, console, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from solollm.config import RunConfig
    from solollm.planning import TrainingPlan, Wishes

_EPILOG = """\b
Examples:
  solollm plan --preset 2.7b --device rtx-4090
  solollm plan --preset 7b --device rtx-4090 --host-memory 64
  solollm plan --hours 48 --device m4-max-64
  solollm plan --largest --device m2-16
  solollm plan small.toml --calibrate 20
  solollm plan --preset 1.3b --compare
"""
_SHORTCUTS = {
    "corpus": "data.corpus",
    "preset": "model.preset",
    "depth": "model.depth",
    "hours": "train.hours",
    "tokens": "train.tokens",
}


@click.command("plan", epilog=_EPILOG)
@click.argument("config_path", metavar="[CONFIG]", type=click.Path(path_type=Path), required=False)
@click.option("--device", default="this", show_default=True, help="rtx-4090, m4-max-64, h200, ...")
@click.option(
    "--host-memory", type=Number(min=0), help="GiB beside the card; default 64, or what is here."
)
@click.option("--preset", help="Model by name: 15m, 125m, 350m, 1.3b, 2.7b, 7b.")
@click.option("--depth", type=int, help="Model by one number, its layers.")
@click.option(
    "--hours", type=Number(min=0, min_open=True), help="How long; alone it also chooses the model."
)
@click.option("--tokens", type=Number(min=1), help="How many tokens to train on.")
@click.option("--corpus", type=click.Path(), help="A built corpus, for its vocabulary.")
@click.option("--calibrate", type=int, default=0, metavar="N", help="Measure N steps here first.")
@click.option("--largest", is_flag=True, help="The largest model that the memory holds.")
@click.option("--compare", is_flag=True, help="The same training on every device known.")
@click.option("--price", type=Number(min=0), help="Of a kilowatt-hour; default 0.30.")
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Any setting.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def command(
    config_path: Path | None, device: str, host_memory: float | None, calibrate: int,
    largest: bool, compare: bool, price: float | None, overrides: tuple[str, ...], as_json: bool,
    **shortcuts: Any,
) -> None:  # fmt: skip
    """Does it fit, how long does it take, what does it cost: before a training is begun.

    For this machine or another. What is projected from datasheets says so; --calibrate measures
    this machine instead. What cannot fit is refused, with the cheapest change that does.
    """
    from solollm import planning
    from solollm.config import load_config

    if shortcuts["tokens"] is not None:
        shortcuts["tokens"] = int(shortcuts["tokens"])
    given = [
        f"{_SHORTCUTS[name]}={json.dumps(value)}"
        for name, value in shortcuts.items()
        if value is not None
    ]
    config = load_config(config_path, [*given, *overrides])
    wishes = planning.Wishes(
        device=device,
        host_bytes=int((host_memory or 0) * 2**30),
        calibrate_steps=calibrate,
        price_per_kwh=planning.DEFAULT_PRICE if price is None else price,
        vocab_size=_vocab_size(config),
        largest=largest,
    )
    if compare:
        _compare(config, wishes, as_json=as_json)
        return
    made = planning.plan_training(config, wishes)
    if as_json:
        print_json(plain_values(made))
    else:
        show(made, console())


def show(made: TrainingPlan, terminal: Console) -> None:
    """Print a plan."""
    from rich.padding import Padding

    sections = [("Training", _training(made)), ("Memory", _memory(made)), ("Time", _time(made))]
    if len(made.options) > 1:
        sections.append(("All ways", _options(made)))
        sections.append(("What they cost", _costs(made)))
    for title, content in sections:
        terminal.print(f"\n{title}", style="bold")
        terminal.print(Padding(content, (0, 0, 0, 2)))


def plain_values(made: TrainingPlan) -> Mapping[str, object]:
    """A plan as plain values, for programs."""
    return {
        "device": made.device.name,
        "backend": made.backend,
        "num_parameters": made.shape.model.num_parameters(),
        "model": made.shape.model.model_dump(mode="json"),
        "seq_len": made.plan.seq_len,
        "batch_size": made.plan.batch_size,
        "micro_batch_size": made.plan.micro_batch_size,
        "activation_checkpointing": made.plan.activation_checkpointing,
        "compute_dtype": made.plan.compute_dtype,
        "settings": dict(made.plan.settings),
        "state_bits": made.config.optimizer.state_bits,
        "device_bytes": dict(made.plan.memory_bytes),
        "device_limit_bytes": made.room.device_bytes,
        "host_bytes": dict(made.plan.host_memory_bytes),
        "host_limit_bytes": made.room.host_bytes,
        "checkpoint_bytes": made.checkpoint_bytes,
        "disk_bytes": made.disk_bytes,
        "steps": made.steps,
        "tokens": made.forecast.tokens,
        "tokens_per_second": made.forecast.tokens_per_second,
        "step_seconds": made.forecast.step_seconds,
        "hours": made.forecast.hours,
        "kilowatt_hours": made.forecast.kilowatt_hours,
        "money": made.forecast.money,
        "price_per_kwh": made.price_per_kwh,
        "drawing_seconds": made.forecast.drawing_seconds,
        "reference_seconds": made.forecast.reference_seconds,
        "token_milliseconds": _token_milliseconds(made),
        "rate_source": made.forecast.rate_source,
        "is_measured": made.forecast.is_measured,
        "calibrated_cpu_seconds": made.calibration.step_cpu_seconds if made.calibration else None,
        "options": [vars(option) for option in made.options],
    }


def _token_milliseconds(made: TrainingPlan) -> float:
    """The least that generating takes there for one sequence, with weights of 16 bits."""
    from solollm.drawing import token_seconds

    return 1e3 * token_seconds(made.shape.model, made.device, item_bytes=2.0)


def _vocab_size(config: RunConfig) -> int:
    from solollm.planning import DEFAULT_VOCAB_SIZE, vocab_size_of

    if config.data.corpus:
        return vocab_size_of(Path(config.data.corpus))
    return config.model.config.vocab_size if config.model.config else DEFAULT_VOCAB_SIZE


def _grid() -> Table:
    from rich.table import Table

    return Table.grid(padding=(0, 2))


def _training(made: TrainingPlan) -> Table:
    from solollm.report.charts import count_text

    model, plan, rows = made.shape.model, made.plan, _grid()
    layers = f"{model.num_hidden_layers} layers, {model.hidden_size} wide, {model.vocab_size:,} ids"
    rows.add_row("device", f"{made.device.name} ({made.backend})")
    rows.add_row("model", f"{count_text(model.num_parameters())} parameters: {layers}")
    rows.add_row(
        "step",
        f"{plan.batch_size} rows of {plan.seq_len} tokens, {plan.micro_batch_size} at once,"
        f" {plan.compute_dtype}{', recomputing' if plan.activation_checkpointing else ''}",
    )
    chosen = [f"{name}={value}" for name, value in plan.settings.items()]
    if plan.state_bits is not None:
        chosen.append(f"optimizer.state_bits={plan.state_bits}")
    if chosen:
        rows.add_row("chosen", ", ".join(chosen))
    ratio = made.forecast.tokens / model.num_matrix_parameters()
    rows.add_row(
        "length",
        f"{made.steps:,} steps, {count_text(made.forecast.tokens)} tokens"
        f" ({ratio:.3g} per parameter that multiplies)",
    )
    return rows


def _memory(made: TrainingPlan) -> Table:
    from solollm.planner import format_bytes

    rows = _grid()
    for place, table, limit in (
        ("device", made.plan.memory_bytes, made.room.device_bytes),
        ("host", made.plan.host_memory_bytes, made.room.host_bytes),
    ):
        for name, size in table.items():
            rows.add_row(place, name, format_bytes(size))
        if table:
            total = format_bytes(sum(table.values()))
            rows.add_row(place, "[bold]in all[/]", f"[bold]{total}[/] of {format_bytes(limit)}")
    rows.add_row("disk", "one checkpoint", format_bytes(made.checkpoint_bytes))
    rows.add_row("disk", "kept and being written", format_bytes(made.disk_bytes))
    return rows


def _time(made: TrainingPlan) -> Table:
    from solollm.report.charts import count_text
    from solollm.report.html import duration_text

    told, rows = made.forecast, _grid()
    rows.add_row("speed", f"{count_text(told.tokens_per_second)} tokens/s")
    rows.add_row("step", duration_text(told.step_seconds))
    if told.copy_seconds:
        busy = f"computing {told.compute_seconds:.3g} s, copying {told.copy_seconds:.3g} s"
        rows.add_row("", busy)
    if told.drawing_seconds:
        rows.add_row("", f"of it drawing answers, at most {told.drawing_seconds:.3g} s")
    if told.reference_seconds:
        rows.add_row("", f"of it the reference {told.reference_seconds:.3g} s")
    rows.add_row("in all", duration_text(told.seconds))
    rows.add_row(
        "energy",
        f"{told.kilowatt_hours:,.3g} kWh at {made.device.watts:.0f} W,"
        f" {told.money:,.2f} at {made.price_per_kwh:.2f} per kWh",
    )
    kind = "measured" if told.is_measured else "projection"
    rows.add_row("from", f"{kind}: {told.rate_source}")
    rows.add_row(
        "answers", f"{_token_milliseconds(made):.3g} ms per token at the least, in 16 bits"
    )  # fmt: skip
    if made.calibration is not None:
        rows.add_row("", f"{made.calibration.step_cpu_seconds:.3g} processor seconds per step")
    return rows


def _options(made: TrainingPlan) -> Table:
    from rich.table import Table

    from solollm.planner import format_bytes
    from solollm.report.charts import count_text

    rows = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    for name in ("way", "recompute", "rows", "device", "host", "tokens/s", "fits"):
        rows.add_column(name, no_wrap=True)
    for option in made.options:
        verdict = f"[yellow]lacks {format_bytes(option.missing_bytes)}[/]"
        if not option.missing_bytes:
            verdict = "chosen" if option.is_chosen else "if asked" if option.consent else "yes"
        rows.add_row(
            f"[bold]{option.name}[/]" if option.is_chosen else option.name,
            "yes" if option.activation_checkpointing else "no",
            str(option.micro_batch_size),
            format_bytes(option.device_bytes),
            format_bytes(option.host_bytes) if option.host_bytes else "",
            count_text(option.tokens_per_second),
            verdict,
        )
    return rows


def _costs(made: TrainingPlan) -> Table:
    rows = _grid()
    for name, cost in {option.name: option.cost for option in made.options if option.cost}.items():
        rows.add_row(name, cost)
    rows.add_row("recompute", "a third more operations")
    return rows


def _compare(config: RunConfig, wishes: Wishes, *, as_json: bool) -> None:
    from solollm import planning
    from solollm.errors import PlanError

    found = list(planning.compare_devices(config, wishes))
    if as_json:
        print_json(
            {
                entry.name: {"refused": made.what, "fix": made.fix}
                if isinstance(made, PlanError)
                else plain_values(made)
                for entry, made in found
            }
        )
        return
    from rich.table import Table

    from solollm.planner import format_bytes
    from solollm.report.charts import count_text
    from solollm.report.html import duration_text

    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("device", "parameters", "memory", "host", "tokens/s", "time", "kWh"):
        rows.add_column(name, no_wrap=True)
    for entry, made in found:
        if isinstance(made, PlanError):
            rows.add_row(entry.name, "[yellow]does not fit[/]")
            continue
        host = sum(made.plan.host_memory_bytes.values())
        rows.add_row(
            entry.name,
            count_text(made.shape.model.num_parameters()),
            format_bytes(sum(made.plan.memory_bytes.values())),
            format_bytes(host) if host else "",
            count_text(made.forecast.tokens_per_second),
            duration_text(made.forecast.seconds),
            f"{made.forecast.kilowatt_hours:,.3g}",
        )
    console().print(rows)
