"""`solollm verify resume|migration`: skins of `solollm.resume_proof` and
`solollm.migration_proof`. `verify faults` is `solollm.commands.verify_faults`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from solollm.commands import print_json
from solollm.commands.pretrain import say
from solollm.commands.verify_faults import faults, require_new

if TYPE_CHECKING:
    from solollm.config import RunConfig
    from solollm.migration_proof import Move
    from solollm.resume_proof import Life, ResumeProof

_EPILOG = """\b
Examples:
  solollm verify resume
  solollm verify resume --kills 100 --steps 2000 --seed 7
  solollm verify resume --config small.toml --kills 5
"""


_MIGRATION = """\b
Examples:
  solollm verify migration
  solollm verify migration --backends mlx,torch --cut 20 --steps 60
  solollm verify migration --config small.toml --cut 100 --steps 200
"""
_CONFIG = click.option(
    "--config", "config_path", type=click.Path(path_type=Path, exists=True),
    help="Prove it on this training instead of a tiny one.",
)  # fmt: skip


@click.group("verify", epilog="\b\nExample:\n  solollm verify resume --kills 20")
def command() -> None:
    """Prove on this machine what is promised."""


command.add_command(faults)


@command.command("resume", epilog=_EPILOG)
@click.option("--kills", type=click.IntRange(1), default=20, show_default=True)
@click.option("--steps", type=click.IntRange(10), help="Of the run; default: 15 for each kill.")
@click.option("--seed", default=0, show_default=True, help="Of the moments of the kills.")
@_CONFIG
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
        config = _training(place, steps or 15 * kills, config_path, asked_steps=steps)
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


@command.command("migration", epilog=_MIGRATION)
@click.option("--cut", type=click.IntRange(1), help="Move after this step; default: half way.")
@click.option("--steps", type=click.IntRange(2), help="Of the run; default: 40.")
@click.option("--backends", help="Two names, as in mlx,torch; default: those that run here.")
@_CONFIG
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the runs in this new folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document per way instead.")
def migration(
    cut: int | None, steps: int | None, backends: str | None, config_path: Path | None,
    folder: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Move a real run from one backend to the other and back, and compare with runs that stayed.

    The run is packed at the cut, unpacked and gone on with. Batches and learning rates must be
    equal, what the other backend takes in it must give out again bit for bit, and losses must stay
    within the band of the compute dtype; if not, this ends with 3. With one backend here the run
    moves from it to itself, where all must be equal.
    """
    from solollm.errors import IntegrityError
    from solollm.migration_proof import prove_migration

    pair = _two_backends(backends)
    with _folder(folder) as place:
        config = _training(place, steps or 40, config_path, asked_steps=steps)
        middle = cut or (config.train.steps or 2) // 2
        if not as_json:
            say(f"{config.train.steps} steps on {' and '.join(dict.fromkeys(pair))}, then moved"
                f" after step {middle}")  # fmt: skip
        failed = []
        for move in prove_migration(config, place, backends=pair, cut=middle):
            _show_move(move, as_json=as_json)
            failed += [] if move.holds else [f"{move.source} to {move.target}"]
    if failed:
        raise IntegrityError(
            f"a run does not move from {' nor from '.join(failed)}",
            why="what differs is above",
            fix="please report this with the output of `solollm doctor`",
        )


def _two_backends(asked: str | None) -> tuple[str, str]:
    """The names asked for, or the two best that run here, or the one there is, twice."""
    from solollm.errors import ConfigError
    from solollm.registry import find_backends, select_backend

    names = [name.strip() for name in asked.split(",")] if asked else []
    if asked and len(names) != 2:
        raise ConfigError(f"--backends {asked} is not two names", fix="for example mlx,torch")
    usable = [c.name for c in find_backends() if c.probe.available and c.factory is not None]
    found = names or usable[:2] or [select_backend().backend.name]
    return found[0], found[-1]


def _show_move(move: Move, *, as_json: bool) -> None:
    if as_json:
        steps = [{**pair._asdict(), "deviation": pair.deviation} for pair in move.steps]
        summary = {"holds": move.holds, "deviation": move.deviation}
        print_json({**move.__dict__, **summary, "steps": steps})
        return
    say("")
    say(f"{move.source} to {move.target}, moved after step {move.cut}")
    say(f"{'step':>6}  {'batch':12}  {'lr':>9}  {'loss':>10}  {'unmoved':>10}  deviation")
    for pair in move.steps:
        say(
            f"{pair.step:>6}  {pair.batch[:12]}  {pair.lr:9.3e}  {pair.loss:10.6f}"
            f"  {pair.unmoved_loss:10.6f}  {pair.deviation:.1e}"
        )
    allowed = f"{move.tolerance:.0e} is allowed" if move.tolerance else "none is allowed"
    say(f"largest deviation of a loss: {move.deviation:.1e}; {allowed}")
    say(f"what came next at the cut: {move.continuation}")
    say(f"batches {_equal(move.batches_equal)}, learning rates {_equal(move.lr_equal)},")
    say(f"  state taken in and given out again: {_equal(move.state_is_equal)}")
    say("largest deviation of the last checkpoints, relative to the largest value of its kind:")
    for group, deviation in sorted(move.groups.items()):
        say(f"  {group:32} {deviation:.1e}")
    say(f"{move.source} to {move.target}: {'HOLDS' if move.holds else 'DOES NOT HOLD'}")


def _equal(value: bool) -> str:
    return "equal" if value else "NOT EQUAL"


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        require_new(kept)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="solollm-verify-") as folder:
        yield Path(folder)


def _training(place: Path, steps: int, path: Path | None, *, asked_steps: int | None) -> RunConfig:
    from solollm.config import load_config
    from solollm.horizon import updated
    from solollm.pretraining import prepare
    from solollm.resume_proof import tiny_training

    if path is None:
        return tiny_training(place, steps=steps)
    config = load_config(path)
    if asked_steps is not None:
        config = updated(config, "train", steps=asked_steps)
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
