"""Where one fault is provoked: a copy of an interrupted run, and what it must end in.

One run trains undisturbed to its end. Another one, of the same configuration, is killed on its way:
that is what every fault begins with, each on a copy of its own. `same_end` compares what became of
it with the undisturbed run: every byte of weights and optimizer, the session's own numbers, and
every logged loss.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from solollm.checkpoint import Checkpoint, latest_checkpoint, step_name, verify_checkpoints
from solollm.config import RunConfig, dump_config
from solollm.durable import TEMPORARY
from solollm.errors import BackendError, SoloLLMError
from solollm.fault_proof.arming import kill_between_saves
from solollm.fault_proof.lives import Arm, Ended, Life, Nursery, PromiseBroken
from solollm.horizon import updated
from solollm.run_log import Row
from solollm.runs import Run

STEPS, EVERY, LAST_ROW = 24, 6, 15  # the interrupted run logged so far
SAVED = LAST_ROW // EVERY * EVERY  # and had saved so far
BEFORE, NEXT = SAVED - EVERY, SAVED + EVERY
_Item = TypeVar("_Item")


class Ends(NamedTuple):
    """What a run ended in. `digest` covers the bytes of weights and optimizer."""

    digest: str
    session_state: Mapping[str, int | float]
    tokens_seen: int
    losses: Mapping[int, float | None]


@dataclass(frozen=True)
class Base:
    """The undisturbed run's end, and the interrupted run."""

    ends: Ends
    cut: Path
    corpus: Path


def make_base(config: RunConfig, folder: Path, nursery: Nursery) -> Base:
    """Train one run to its end, and one until it is killed. How long they are and when they save is
    this proof's, all else is `config`'s, whose paths hold from here.

    Raises:
        BackendError: a training failed by itself.
    """
    config = updated(config, "train", steps=STEPS)
    config = updated(config, "checkpoint", every_steps=EVERY, every_minutes=0.0, keep_latest=STEPS)
    config = updated(config, "eval", every_steps=0, batches=1, sample_every_steps=STEPS)
    config = updated(updated(config, "eval", sample_tokens=4), "log", every_steps=1)
    folder.mkdir(parents=True)
    settings = folder / "settings.toml"
    settings.write_text(dump_config(config))
    kill = partial(kill_between_saves, saved(folder / "cut", SAVED), LAST_ROW)
    ways: list[tuple[str, Arm | None, int]] = [
        ("straight", None, 0),
        ("cut", kill, -signal.SIGKILL),
    ]
    for name, arm, code in ways:
        words = ["pretrain", "--config", str(settings), "--run", str(folder / name)]
        with nursery.life([*words, "--unsupervised"], folder / f"life-{name}", arm) as life:
            ended = life.end()
        if ended.code != code:
            raise BackendError(
                f"the {name} run of the proof ended with {ended.code}, not {code}",
                why=ended.shown,
                fix="`solollm doctor` looks at the machine",
            )
    require_intact(folder / "cut", BEFORE, SAVED)
    return Base(ends_of(folder / "straight"), folder / "cut", Path(config.data.corpus))


@dataclass
class Ground:
    """The place of one fault. A promise that does not hold raises PromiseBroken."""

    folder: Path
    base: Base
    nursery: Nursery
    _lives: list[Path] = field(default_factory=list)

    def run(self, **tables: Mapping[str, Any]) -> Path:
        """A fresh copy of the interrupted run; its settings changed where `tables` say so."""
        run = self.folder / "run"
        if run.exists():
            shutil.rmtree(run)
        shutil.copytree(self.base.cut, run)
        self.change_settings(run, **tables)
        return run

    def change_settings(self, run: Path, **tables: Mapping[str, Any]) -> None:
        """Write `run.toml` anew."""
        config = Run.open(run).config
        for table, values in tables.items():
            config = updated(config, table, **values)
        (run / "run.toml").write_text(dump_config(config))

    @contextlib.contextmanager
    def life(self, *words: str, arm: Arm | None = None) -> Iterator[Life]:
        """`solollm` with these words in a process of its own; dead when this is left."""
        place = self.folder / f"life-{len(self._lives) + 1}"
        self._lives.append(place)
        with self.nursery.life(words, place, arm) as life:
            yield life

    def live(self, *words: str, code: int, arm: Arm | None = None) -> Ended:
        """A life to its end, which must be `code`; the fault in it must have come."""
        with self.life(*words, arm=arm) as life:
            ended = life.end()
        require(
            ended.code == code,
            f"`solollm {words[0]}` ended with {ended.code}, not {code}: {ended.shown}",
        )
        require(arm is None or life.mark.exists(), "the fault itself did not come about")
        require("a bug in SoloLLM" not in ended.said and "Traceback" not in ended.said,
                f"the ending was not foreseen: {ended.shown}")  # fmt: skip
        return ended

    def resume(self, run: Path, *flags: str, code: int = 0, arm: Arm | None = None) -> Ended:
        """`solollm resume`, to its end, which must be `code`."""
        return self.live("resume", str(run), *flags, "--unsupervised", code=code, arm=arm)

    def goes_on(self, run: Path, *flags: str, step: int = SAVED) -> Ended:
        """The run must go on from `step` to the undisturbed run's end."""
        ended = self.resume(run, *flags)
        resumed = [row["step"] for row in events(run, "resumed")]
        require(resumed[-1:] == [step], f"the run went on from step {resumed[-1:]}, not {step}")
        self.same_end(run)
        return ended

    def same_end(self, run: Path, *, other: Ends | None = None) -> None:
        """The run must have ended in what the undisturbed one did, or in `other`."""
        found, expected = ends_of(run), other or self.base.ends
        for name, here, there in zip(Ends._fields, found, expected, strict=True):
            require(
                here == there, f"{name} is not that of the undisturbed run: {_apart(here, there)}"
            )
        stale = half_saved(run)
        require(not stale, f"{stale} was left behind")


class Fault(NamedTuple):
    """One fault of the catalogue: what is done, what is promised, and the function that does and
    checks it. That gives what was seen, in a few words."""

    name: str
    done: str
    promise: str
    provoke: Callable[[Ground], str]


def require(is_so: bool, otherwise: str) -> None:
    """Raise PromiseBroken unless it is so."""
    if not is_so:
        raise PromiseBroken(otherwise)


def require_said(ended: Ended, *parts: str) -> None:
    """What a life said must name all these."""
    for part in parts:
        require(part in ended.said, f"the message does not name {part!r}: {ended.shown}")


def require_intact(run: Path, *steps: int) -> None:
    """The run must hold exactly these checkpoints, each proven to the byte."""
    reports = verify_checkpoints(run / "checkpoints")
    found = {report.step: report.problem for report in reports}
    require(
        found == dict.fromkeys(steps, ""),
        f"the checkpoints are {found}, not intact ones of {steps}",
    )


def require_refused(read: Callable[[], object], *parts: str) -> None:
    """Reading must be refused by an error of ours that names all these."""
    try:
        read()
    except SoloLLMError as error:
        for part in parts:
            require(part in str(error), f"the refusal does not name {part!r}: {error}")
        return
    raise PromiseBroken(f"what is damaged was taken for whole ({', '.join(parts)})")


def ends_of(run: Path) -> Ends:
    """What a finished run ended in. Raises PromiseBroken where it is not finished."""
    checkpoint = newest(run)
    require(checkpoint.step == STEPS, f"the run's last step is {checkpoint.step}, not {STEPS}")
    state = checkpoint.state
    checkpoint.close()
    rows = [row for row in Run.open(run).read_metrics() if row["kind"] == "train"]
    steps = [row["step"] for row in rows]
    require(steps == sorted(set(steps)), f"steps are logged twice or in disorder: {steps}")
    losses = {row["step"]: row["loss"] for row in rows}
    digest = checkpoint.certificate.digest
    return Ends(digest, state.session_state, state.tokens_seen, losses)


def newest(run: Path) -> Checkpoint:
    """The newest checkpoint, every byte of it proven."""
    found, damaged = latest_checkpoint(run / "checkpoints")
    if found is None:
        raise PromiseBroken(f"no checkpoint is intact: {'; '.join(damaged) or 'there is none'}")
    return found


def saved(run: Path, step: int, name: str = "") -> Path:
    """A checkpoint of the run, or a file of it."""
    return run / "checkpoints" / step_name(step) / name


def half_saved(run: Path) -> list[str]:
    """The folders that an interrupted save has left behind."""
    return [
        path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(TEMPORARY)
    ]


def the_only(found: Sequence[_Item], what: str) -> _Item:
    """The one that there is; there must be exactly one."""
    require(len(found) == 1, f"there is not one {what} but {len(found)}: {str(found)[:200]}")
    return found[0]


def events(run: Path, kind: str) -> list[Row]:
    """The run's events of one kind, oldest first."""
    return [row for row in Run.open(run).read_events() if row["kind"] == kind]


def content_of(run: Path) -> dict[str, bytes]:
    """Every file of a run but its lock, byte by byte."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def flip_bit(path: Path, place: float) -> None:
    """Turn one bit over, at this share of the file."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(place * len(content)))] ^= 1 << int(place * 1000) % 8
    path.write_bytes(content)


def _apart(here: object, there: object) -> str:
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        differing = [key for key in {**there, **here} if here.get(key) != there.get(key)]
        return f"{len(differing)} differ, the first at {differing[:1]}"
    return f"{str(here)[:24]}, not {str(there)[:24]}"
