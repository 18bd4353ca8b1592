"""`solollm runs list|show|verify|pack|unpack|push`: skins over `solollm.runs`,
`solollm.checkpoint`, `solollm.packing` and `solollm.pushing`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from solollm.commands import console, print_json, watching
from solollm.commands.pretrain import say
from solollm.commands.runs_card import card
from solollm.errors import quoted

if TYPE_CHECKING:
    from solollm.packing import Packed
    from solollm.reality import Line
    from solollm.runs import Run, RunSummary, Stretch

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
_RUN = click.argument("run", type=click.Path(path_type=Path))


_EPILOG = """\b
Examples:
  solollm runs list
  solollm runs verify runs/first
  solollm runs pack runs/first first.solo
"""


@click.group("runs", epilog=_EPILOG)
def command() -> None:
    """List, show, watch, verify, describe and move runs."""


command.add_command(card)
command.add_command(watching.command)


@command.command("list", epilog="\b\nExample:\n  solollm runs list\n  solollm runs list old/runs")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@_JSON
def list_command(folder: Path, as_json: bool) -> None:
    """The runs in FOLDER (default: runs): how far each is, and whether it is going."""
    from solollm.runs import list_runs

    found = list_runs(folder)
    if as_json:
        for summary in found:
            print_json(summary._asdict())
        return
    if not found:
        say(f"no runs in {folder}; `solollm pretrain` starts one")
        return
    _table(["run", "state", "step", "of", "loss"], [_cells(summary) for summary in found])


@command.command("show", epilog="\b\nExample:\n  solollm runs show runs/first")
@_RUN
@_JSON
def show(run: Path, as_json: bool) -> None:
    """What RUN is and how it went; writes its report.html anew."""
    from solollm.checkpoint import list_checkpoints
    from solollm.reality import compare
    from solollm.report.html import write_report
    from solollm.runs import Run, stretches, summarize

    opened = Run.open(run)
    page = write_report(opened)
    summary = summarize(run)
    steps = [step for step, _ in list_checkpoints(opened.checkpoints)]
    facts = {
        "run": str(run),
        "state": summary.state,
        "step": summary.step,
        "total_steps": summary.total_steps,
        "loss": summary.last_loss,
        **_last_evaluation(opened),
        "checkpoints": steps,
        "ran_on": [_stretch(part) for part in stretches(opened.read_lineage(), summary.step)],
        "planned": [_against(line) for line in compare(opened.read_plan())],
        "report": str(page),
    }
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        between = "\n" + " " * 17 if name in ("ran_on", "planned") else ", "
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            text = between.join(map(str, value))
        say(f"{name.replace('_', ' '):15}  {text}")


@command.command("verify", epilog="\b\nExample:\n  solollm runs verify runs/first")
@_RUN
@_JSON
def verify(run: Path, as_json: bool) -> None:
    """Read every byte of every checkpoint of RUN. Ends with 3 if one is damaged."""
    from solollm.checkpoint import verify_checkpoints
    from solollm.errors import IntegrityError
    from solollm.runs import Run

    reports = verify_checkpoints(Run.open(run).checkpoints)
    for report in reports:
        if as_json:
            print_json({"step": report.step, "path": report.path, "problem": report.problem})
        else:
            say(f"{report.path.name}  {report.problem or 'intact'}")
    damaged = [report.path.name for report in reports if report.problem]
    if damaged:
        raise IntegrityError(
            f"{len(damaged)} of {len(reports)} checkpoints of {run} are damaged:"
            f" {', '.join(damaged)}",
            fix="`solollm resume` goes on from the newest intact one",
        )


_PACK = """\b
Examples:
  solollm runs pack runs/first first.solo
  solollm runs pack runs/first first.solo --without-corpus
"""
_UNPACK = """\b
Example:
  solollm runs unpack first.solo moved
  solollm resume moved/runs/first
"""
_WITHOUT_CORPUS = click.option(
    "--without-corpus", is_flag=True, help="Leave the corpus; the other machine has it."
)
_WITHOUT_BASE = click.option(
    "--without-base", is_flag=True, help="Leave an adapter's base; the other machine has it."
)
_BACKEND = click.option(
    "--backend", default="auto", show_default=True,
    help="What computes the certificate's next losses, if they are not in it yet.",
)  # fmt: skip


@command.command("pack", epilog=_PACK)
@_RUN
@click.argument("archive", type=click.Path(path_type=Path))
@_WITHOUT_CORPUS
@_WITHOUT_BASE
@click.option("--step", type=click.IntRange(0), help="This checkpoint instead of the newest.")
@_BACKEND
@_JSON
def pack_command(
    run: Path, archive: Path, without_corpus: bool, without_base: bool, step: int | None,
    backend: str, as_json: bool,
) -> None:  # fmt: skip
    """Write RUN into the one file ARCHIVE: its checkpoint, its history and its corpus; of a
    fine-tuning its samples and an adapter's base.

    The checkpoint's certificate says what comes next; where the run goes on, that is computed
    again first.
    """
    from solollm.packing import pack
    from solollm.planner import format_bytes

    packed = pack(
        run, archive, with_corpus=not without_corpus, with_base=not without_base, step=step,
        backend=backend,
    )  # fmt: skip
    if as_json:
        print_json(packed.__dict__)
        return
    for reason in packed.skipped:
        say(f"left behind: {reason}")
    say(f"packed step {packed.step}, {_beside(run, packed)}: {packed.num_files} files,")
    say(f"  {format_bytes(packed.archive_bytes)} in {archive}")
    say(f"there: solollm runs unpack {quoted(archive.name)} FOLDER")


@command.command("unpack", epilog=_UNPACK)
@click.argument("archive", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@_JSON
def unpack_command(archive: Path, folder: Path, as_json: bool) -> None:
    """Put a packed run into the project folder FOLDER: runs/NAME, corpora/NAME, models/NAME.

    Every byte is proven before anything appears there; a damaged archive ends with 3.
    """
    from solollm.packing import unpack

    unpacked = unpack(archive, folder)
    if as_json:
        print_json(unpacked.__dict__)
        return
    say(f"{unpacked.num_files} files, all of them proven")
    for place in unpacked.missing:
        kind = "base" if place.parent.name == "models" else "corpus"
        say(f"its {kind} is not here: put it at {place}, or resume with --{kind}")
    say(f"go on from step {unpacked.step}: solollm resume {quoted(unpacked.run)}")


_PUSH = """\b
Examples:
  solollm runs push runs/first ada@studio.local:models
  solollm runs push runs/first ada@box:models --without-corpus --ssh "ssh -p 2222"
"""


@command.command("push", epilog=_PUSH)
@_RUN
@click.argument("target", metavar="USER@HOST:DIR")
@_WITHOUT_CORPUS
@_WITHOUT_BASE
@_BACKEND
@click.option("--ssh", default="ssh", show_default=True, help="The ssh command, with its options.")
@_JSON
def push_command(
    run: Path, target: str, without_corpus: bool, without_base: bool, backend: str, ssh: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Send RUN to another machine by rsync over ssh: DIR/runs/NAME, DIR/corpora/NAME and
    DIR/models/NAME there.

    What is there already is not sent. If the connection breaks off this ends with 75; the same
    command goes on where it ended. Every byte is proven there before it gets its name. The other
    machine needs rsync and Python 3.
    """
    import shlex

    from solollm.planner import format_bytes
    from solollm.pushing import Programs, push

    def tell(name: str, size: int) -> None:
        if not as_json:
            say(f"  {name}  {format_bytes(size)}")

    pushed = push(
        run, target, with_corpus=not without_corpus, with_base=not without_base, backend=backend,
        programs=Programs(ssh=tuple(shlex.split(ssh))), on_send=tell,
    )  # fmt: skip
    if as_json:
        print_json(pushed.__dict__)
        return
    for reason in pushed.skipped:
        say(f"left behind: {reason}")
    say(f"step {pushed.step} is on {pushed.host}, every byte proven: {pushed.sent_files} of")
    say(f"  {pushed.num_files} files were sent, {format_bytes(pushed.sent_bytes)}")
    say(f"there: solollm resume {quoted(pushed.run)}")


def _beside(run: Path, packed: Packed) -> str:
    """What came along, in words."""
    from solollm.runs import Run

    if Run.open(run).config.finetune is None:
        return f"with {', '.join(packed.corpora)}" if packed.corpora else "without its corpus"
    return f"with its samples and {packed.base or 'no base'}"


def _cells(summary: RunSummary) -> list[str]:
    total = f"{summary.total_steps:,}" if summary.total_steps else "?"
    loss = f"{summary.last_loss:.3f}" if summary.last_loss is not None else ""
    return [summary.name, summary.state, f"{summary.step:,}", total, loss]


# What is measured on what was held out, by objective: the name shown, the key of a row. The loss
# of GRPO's rows is 1 - reward, and says nothing more.
_HELD_OUT = {
    "": {"held_out_loss": "loss", "bits_per_byte": "bits_per_byte"},
    "dpo": {"held_out_loss": "loss", "margin": "margin", "accuracy": "accuracy"},
    "grpo": {"held_out_reward": "reward"},
}


def _last_evaluation(run: Run) -> dict[str, Any]:
    rows = [row for row in run.read_metrics() if row.get("kind") == "eval"]
    if not rows:
        return {}
    tuning = run.config.finetune
    keys = _HELD_OUT.get(tuning.objective if tuning else "", _HELD_OUT[""])
    return {name: rows[-1].get(key) for name, key in keys.items()}


def _stretch(part: Stretch) -> str:
    """One line: which steps ran on what."""
    environment = part.environment
    steps = f"steps {part.first_step:,} to {part.last_step:,}"
    facts = f"{environment.get('backend')} on {environment.get('device')}"
    cpu, dtype = environment.get("cpu"), environment.get("compute_dtype")
    versions = " ".join(f"{n} {v}" for n, v in (environment.get("versions") or {}).items() if v)
    return f"{steps}: " + ", ".join(str(fact) for fact in (facts, dtype, cpu, versions) if fact)


def _against(line: Line) -> str:
    """One planned quantity beside what became of it."""
    from solollm.report.html import quantities_text

    planned, measured = quantities_text(line)
    return f"{line.name.replace('_', ' ')}: {planned}, measured {measured} ({line.ratio:.2f})"


def _table(head: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)
