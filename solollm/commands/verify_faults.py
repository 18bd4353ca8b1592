"""`solollm verify faults`: the skin of `solollm.fault_proof.proof`."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from solollm.commands import print_json
from solollm.commands.pretrain import say

if TYPE_CHECKING:
    from solollm.fault_proof.ground import Fault
    from solollm.fault_proof.proof import Outcome

_EPILOG = """\b
Examples:
  solollm verify faults
  solollm verify faults --list
  solollm verify faults --only kill-in-a-save --only full-in-the-weights
"""


@click.command("faults", epilog=_EPILOG)
@click.option("--only", "names", multiple=True, metavar="NAME", help="Of --list; several times.")
@click.option("--list", "is_list", is_flag=True, help="Name the faults and what is promised.")
@click.option("--backend", default="auto", show_default=True, help="auto, or the name of one.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Keep the undisturbed run in this new folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document per fault instead.")
def faults(
    names: tuple[str, ...], is_list: bool, backend: str, folder: Path | None, as_json: bool
) -> None:
    """Provoke faults on a real run, one after the other, and see each end as promised.

    A tiny run trains undisturbed, another one is killed on its way. Each fault befalls a copy of
    that one: kills inside saves, full disks, damaged files, steps that are not finite, two
    processes at once. Nothing may be lost, the error must be the one that is promised, and the run
    must then go on to the undisturbed run's weights, optimizer and losses, to the bit. Where a
    promise is broken this ends with 1, and what is left of that run is kept.
    """
    from solollm.errors import SoloLLMError
    from solollm.fault_proof.proof import chosen_faults, prove_faults, training_for_faults

    chosen = chosen_faults(names)
    if is_list:
        for fault in chosen:
            _show_fault(fault, as_json=as_json)
        return
    if folder is not None:
        require_new(folder)
    place = folder or Path(tempfile.mkdtemp(prefix="solollm-verify-"))
    outcomes: list[Outcome] = []
    begun = time.monotonic()
    try:
        if not as_json:
            say("an undisturbed run first, and one that is killed on its way")
        config = training_for_faults(place, backend)
        for outcome in prove_faults(config, place, faults=chosen):
            outcomes.append(outcome)
            _show(outcome, as_json=as_json)
    finally:
        broken = [outcome for outcome in outcomes if outcome.verdict == "failed"]
        if folder is None and not broken:
            shutil.rmtree(place, ignore_errors=True)
    _summarize(outcomes, time.monotonic() - begun, as_json=as_json)
    if broken:
        raise SoloLLMError(
            f"{len(broken)} of {len(outcomes)} faults did not end as promised:"
            f" {', '.join(outcome.fault.name for outcome in broken)}",
            why="what was found is above",
            fix=f"the runs, and what each process said, are in {place}; please report this with"
            " the output of `solollm doctor`",
        )


def _show_fault(fault: Fault, *, as_json: bool) -> None:
    if as_json:
        print_json({"name": fault.name, "done": fault.done, "promise": fault.promise})
        return
    say(f"{fault.name:22}  {fault.done}")
    say(f"{'':22}  -> {fault.promise}")


def _show(outcome: Outcome, *, as_json: bool) -> None:
    fault = outcome.fault
    if as_json:
        print_json(
            {
                "name": fault.name,
                "done": fault.done,
                "promise": fault.promise,
                "verdict": outcome.verdict,
                "seen": outcome.seen,
                "seconds": round(outcome.seconds, 2),
                "folder": str(outcome.folder) if outcome.verdict == "failed" else None,
            }
        )
        return
    shown = outcome.verdict.upper() if outcome.verdict == "failed" else outcome.verdict
    say(f"{shown:7}  {fault.name:22}  {outcome.seconds:5.1f} s  {outcome.seen}")
    if outcome.verdict == "failed":
        say(f"{'':9}done: {fault.done}; promised: {fault.promise}")


def _summarize(outcomes: list[Outcome], seconds: float, *, as_json: bool) -> None:
    verdicts = [outcome.verdict for outcome in outcomes]
    counts = {verdict: verdicts.count(verdict) for verdict in ("ok", "failed", "skipped")}
    if as_json:
        print_json({"faults": len(outcomes), **counts, "seconds": round(seconds, 1)})
        return
    shown = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    say(f"{shown}, in {seconds:.0f} s")


def require_new(folder: Path) -> None:
    """Raise ConfigError unless runs can be kept in `folder` without a mix-up."""
    from solollm.errors import ConfigError

    fix = "give --folder the name of a new folder"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no folder", fix=fix)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", fix=fix)
