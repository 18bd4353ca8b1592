"""`solollm doctor`: the diagnosis of `solollm.doctor`, readable at 80 columns."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from solollm.commands import console, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from solollm.doctor import Diagnosis


@click.command("doctor", epilog="\b\nExample:\n  solollm doctor\n  solollm doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
@click.option("--no-speed", is_flag=True, help="Skip the three-second speed probe.")
@click.pass_context
def command(context: click.Context, as_json: bool, no_speed: bool) -> None:
    """What this machine can do, and what to change.

    Looks at the processor, memory, cards, backends, compiler and optional packages, measures the
    matrix-multiply speed, and says which model sizes can be trained here.
    """
    from solollm.doctor import PROBE_SECONDS, examine

    found = examine(probe_seconds=0.0 if no_speed else PROBE_SECONDS)
    if as_json:
        print_json(_as_json(found))
    else:
        show(found, console())
    context.exit(0 if found.chosen else 1)


def show(found: Diagnosis, terminal: Console) -> None:
    """Print a diagnosis."""
    from rich.padding import Padding

    fits = _fits(found)
    sections = [
        ("Machine", _machine(found)),
        ("Backends", _backends(found)),
        ("What can be trained here", fits),
        ("Optional packages", _packages(found)),
    ]
    for title, content in sections:
        terminal.print(f"\n{title}", style="bold")
        terminal.print(Padding(content, (0, 0, 0, 2)))
        if content is fits and found.speed is not None and found.fits:
            note = "  time: projected from the speed above, for 20 tokens per parameter"
            terminal.print(note, style="dim")
        if content is fits and not all(fit.fits for fit in found.fits):
            terminal.print("  what the others need: solollm plan --preset NAME", style="dim")
    terminal.print("\nWhat to change", style="bold")
    for line in found.advice or ("nothing: this machine is ready",):
        terminal.print(Padding(f"- {line}", (0, 0, 0, 2)), markup=False)


def _as_json(found: Diagnosis) -> dict[str, object]:
    values = asdict(found)
    for name in ("backends", "fits", "packages"):
        values[name] = [entry._asdict() for entry in getattr(found, name)]
    values["dtypes"] = found.dtypes._asdict() if found.dtypes else None
    values["speed"] = found.speed._asdict() if found.speed else None
    values["machine"]["gpus"] = [gpu._asdict() for gpu in found.machine.gpus]
    return values


def _grid() -> Table:
    from rich.table import Table

    return Table.grid(padding=(0, 2))


def _machine(found: Diagnosis) -> Table:
    from solollm.planner import format_bytes

    machine, rows = found.machine, _grid()
    cores = f"{machine.physical_cores} cores, {machine.cores} threads usable"
    memory = f"{format_bytes(machine.ram_bytes)}, {format_bytes(machine.available_bytes)} available"
    rows.add_row("system", f"{machine.os} ({machine.arch}), Python {found.python}")
    rows.add_row("processor", f"{machine.cpu}, {cores}")
    rows.add_row("memory", memory)
    for gpu in machine.gpus:
        free = f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.memory_bytes)}"
        rows.add_row("graphics", f"{gpu.name}, {free}")
    if not machine.gpus:
        rows.add_row("graphics", "no card for computing found")
    rows.add_row("right now", _vitals(found))
    rows.add_row("disk here", f"{format_bytes(found.disk_free_bytes)} free")
    rows.add_row("C++ compiler", machine.compiler or "none")
    if found.speed is not None:
        speed = found.speed
        what = f"{speed.gflops:,.0f} GFLOP/s {speed.dtype} on {speed.device} ({speed.library})"
        rows.add_row("speed", what)
    if found.dtypes is not None:
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in found.dtypes.gflops.items())
        rows.add_row("precision", f"{rates} GFLOP/s: runs train in {found.dtypes.choice}")
    return rows


def _vitals(found: Diagnosis) -> str:
    vitals = found.vitals
    power = "on battery" if vitals.on_battery else "on mains power"
    if vitals.battery_percent is not None:
        power += f" ({vitals.battery_percent}%)"
    if vitals.low_power_mode:
        power += ", low-power mode"
    return f"memory pressure {vitals.pressure}, heat {vitals.heat}, {power}"


def _backends(found: Diagnosis) -> Table:
    rows = _grid()
    for state in found.backends:
        shown = f"ready on {state.device}" if state.available else "not usable"
        style = "green" if state.available else "yellow"
        rows.add_row(state.name, f"[{style}]{shown}[/]", state.reason)
    if not found.backends:
        rows.add_row("none is installed")
    return rows


def _fits(found: Diagnosis) -> Table:
    from rich.table import Table

    from solollm.planner import format_bytes
    from solollm.report.charts import count_text
    from solollm.report.html import duration_text

    rows = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in ("preset", "parameters", "fits", "memory", "time"):
        rows.add_column(name, justify="left", no_wrap=True)
    rows.add_column("how")
    for fit in found.fits:
        rows.add_row(
            fit.preset,
            count_text(fit.num_parameters),
            "[green]yes[/]" if fit.fits else "[yellow]no[/]",
            format_bytes(fit.memory_bytes) if fit.fits else "",
            duration_text(fit.seconds) if fit.fits else "",
            fit.detail if fit.fits else "",
        )
    if not found.fits:
        rows.add_row("unknown without a backend")
    return rows


def _packages(found: Diagnosis) -> Table:
    rows = _grid()
    for package in found.packages:
        state = f"[green]{package.version}[/]" if package.version else "[dim]missing[/]"
        rows.add_row(
            package.name, state, package.purpose, "" if package.version else package.install
        )
    return rows
