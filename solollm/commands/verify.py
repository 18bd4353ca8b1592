"""`solollm verify resume`: the skin of `solollm.resume_proof`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from solollm.commands import print_json
from solollm.commands.pretrain import say

if TYPE_CHECKING:
    from solollm.config import RunConfig
    from solollm.resume_proof import Life, ResumeProof

_EPILOG = """\b
Examples:
  solollm verify resume
  solollm verify resume --kills 100 --steps 2000 --seed 7
  solollm verify resume --config small.toml --kills 5
"""


@click.group("verify", epilog="\b\nExample:\n  solollm verify resume --kills 20")
def command() -> None:
    """Prove on this machine what is promised."""


@command.command("resume", epilog=_EPILOG)
@click.option("--kills", type=click.IntRange(1), default=20, show_default=True)
@click.option("--steps", type=click.IntRange(10), help="Of the run; default: 15 for each kill.")
@click.option("--seed", default=0, show_default=True, help="Of the moments of the kills.")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path, exists=True),
    help="Prove it on this training instead of a tiny one.",
)  # fmt: skip
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Keep the two runs in this new folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def resume(
    kills: int, steps: int | None, seed: int, config_path: Path | None, folder: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Kill a real run with SIGKILL at random moments, inside its saves too, and compare.

    Every life of the run is a fresh process. In the end all weights, all optimizer tensors and all
    logged losses must equal those of a run that nobody touched; if not, this ends with 3.
    """
    from solollm.errors import IntegrityError
    from solollm.resume_proof import prove_resume

    with _folder(folder) as place:
        if not as_json:
            say("an undisturbed run first, then one that is killed again and again")
        config = _training(place, kills, steps, config_path)
        proof = prove_resume(
            config, place, kills=kills, seed=seed,
            on_life=lambda life: None if as_json else _show_life(life),
        )  # fmt: skip
    _show(proof, as_json=as_json)
    if not proof.is_equal:
        raise IntegrityError(
            f"the killed run is not equal to the undisturbed one after {proof.steps} steps",
            why=f"state {proof.killed_digest[:16]}, not {proof.straight_digest[:16]}; losses"
            f" {'equal' if proof.losses_equal else 'differ'}",
            fix="please report this with the output of `solollm doctor`",
        )


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="solollm-verify-") as folder:
        yield Path(folder)


def _training(place: Path, kills: int, steps: int | None, path: Path | None) -> RunConfig:
    from solollm.config import load_config
    from solollm.horizon import updated
    from solollm.pretraining import prepare
    from solollm.resume_proof import tiny_training

    if path is None:
        return tiny_training(place, steps=steps or 15 * kills)
    config = load_config(path)
    if steps is not None:
        config = updated(config, "train", steps=steps)
    return prepare(config).config


def _show_life(life: Life) -> None:
    where = "in a save" if life.in_save else "between saves"
    say(f"  from step {life.start_step:>5}, killed after step {life.last_step:>5}, {where}")


def _show(proof: ResumeProof, *, as_json: bool) -> None:
    kills = len(proof.lives)
    if as_json:
        print_json(
            {
                "steps": proof.steps,
                "kills": kills,
                "kills_in_save": proof.kills_in_save,
                "straight_digest": proof.straight_digest,
                "killed_digest": proof.killed_digest,
                "losses_equal": proof.losses_equal,
                "equal": proof.is_equal,
                "lives": [life._asdict() for life in proof.lives],
            }
        )
        return
    verdict = "EQUAL" if proof.is_equal else "NOT EQUAL"
    say(f"{proof.steps} steps, {kills} kills, {proof.kills_in_save} of them in a save")
    say(f"undisturbed  {proof.straight_digest}")
    say(f"killed       {proof.killed_digest}")
    say(f"weights, optimizer and losses: {verdict}")
