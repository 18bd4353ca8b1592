"""The stage of the quickstart in which its run moves to another framework and back.

A copy of the run takes the way that it would take to another machine: it is packed into one file at
an earlier checkpoint and unpacked; the other backend goes on with it, is stopped, and the first one
brings it to its end. Before each first step the certificate says what must come next. Then the
losses of the moved run are laid beside those of the run that stayed.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from solollm.checkpoint import list_checkpoints
from solollm.continuation import tolerance_between
from solollm.environments import Recorded
from solollm.errors import IntegrityError, SoloLLMError, quoted
from solollm.packing import pack, unpack
from solollm.registry import find_backends
from solollm.runs import Run
from solollm.story import Narrator, start

_POLL_SECONDS = 0.1
_STEPS_ABROAD = 30
_STOPPED = 128 + signal.SIGINT
COMPARED_STEPS = 100  # that far the band of losses has been measured


class RoundTrip(NamedTuple):
    """A move there and back. `deviation` is the largest relative one of the losses of `steps`
    logged steps after the cut, `tolerance` what the compute dtypes allow."""

    home: str
    abroad: str
    cut: int
    steps: int
    deviation: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.deviation <= self.tolerance


def move_and_back(narrator: Narrator, folder: Path, run: Path, home: str) -> RoundTrip | None:
    """Move a copy of the finished `run`, trained on the backend `home`, under `folder`; None where
    there is no second backend to move to.

    Raises:
        SoloLLMError: a stage failed; its own message stands above.
        IntegrityError: the moved run is not the continuation of the one that stayed.
    """
    abroad = _another_backend(home)
    narrator.stage(
        "The same run, on another framework and back",
        "weights, optimizer, schedule and place in the data go along; a certificate proves it",
    )
    if not abroad:
        narrator.say(
            f"Only the backend `{home}` runs here, so this is left out. In an environment that has"
            " both PyTorch and MLX (`pip install 'solollm[torch,mlx]'`, or"
            " `tools/quickstart.py --with-mlx`) the run moves between them."
        )
        return None
    cut, last = _cut(run)
    archive = folder / "moving.solo"
    narrator.command(["runs", "pack", str(run), str(archive)])
    pack(run, archive, step=cut, backend=home)
    place = folder / "moved"
    narrator.command(["runs", "unpack", str(archive), str(place)])
    moved = unpack(archive, place).run
    narrator.say(f"packed as it was after step {cut:,}, {archive.stat().st_size / 1e6:.1f} MB")
    _go_on(narrator, moved, abroad, stop_after=min(cut + _STEPS_ABROAD, (cut + last) // 2))
    if _newest_step(moved) < last:
        _go_on(narrator, moved, home)
    trip = _compare(run, moved, home=home, abroad=abroad, cut=cut)
    _tell(narrator, moved, trip)
    if not trip.holds:
        raise IntegrityError(
            f"the moved run deviates by {trip.deviation:.1e}; {trip.tolerance:.0e} is allowed",
            why="the backends do not compute the same",
            fix="please report this with the output of `solollm doctor`",
        )
    return trip


def _another_backend(home: str) -> str:
    usable = [c.name for c in find_backends() if c.probe.available and c.factory is not None]
    return next((name for name in usable if name != home), "")


def _cut(run: Path) -> tuple[int, int]:
    """(the newest checkpoint with enough steps left after it, the last step)."""
    steps = [step for step, _ in list_checkpoints(run / "checkpoints")]
    enough = [step for step in steps if steps[-1] - step >= 2 * _STEPS_ABROAD]
    return (enough[-1] if enough else steps[0]), steps[-1]


def _go_on(narrator: Narrator, run: Path, backend: str, *, stop_after: int | None = None) -> None:
    """`solollm resume`, stopped as by Ctrl-C once `stop_after` is logged."""
    arguments = ["resume", str(run), "--backend", backend, "--unsupervised"]
    narrator.command(arguments)
    before = _num_resumed(run)
    child = start(arguments)
    try:
        while stop_after is not None and child.poll() is None:
            # Until it has begun, the log holds the steps of the run that was packed.
            if _num_resumed(run) > before and max(_losses(run), default=0) >= stop_after:
                narrator.say("Ctrl-C")
                child.send_signal(signal.SIGINT)
                break
            time.sleep(_POLL_SECONDS)
        child.wait()
    except BaseException:
        _end(child)
        raise
    allowed = (0,) if stop_after is None else (0, _STOPPED)
    if child.returncode not in allowed:
        raise SoloLLMError(
            f"the moved run ended with exit code {child.returncode} on `{backend}`",
            why="its own message stands above",
            fix=f"`solollm resume {quoted(run)} --backend {backend}` tries again",
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


def _newest_step(run: Path) -> int:
    return list_checkpoints(run / "checkpoints")[-1][0]


def _losses(run: Path) -> dict[int, float]:
    rows = Run.open(run).read_metrics()
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train" and row["loss"]}


def _num_resumed(run: Path) -> int:
    return sum(event["kind"] == "resumed" for event in Run.open(run).read_events())


def _compare(run: Path, moved: Path, *, home: str, abroad: str, cut: int) -> RoundTrip:
    stayed, found = _losses(run), _losses(moved)
    steps = [step for step in found if cut < step <= cut + COMPARED_STEPS]
    deviation = max(abs(found[s] - stayed[s]) / abs(stayed[s]) for s in steps)
    environments = [part["environment"] for part in Run.open(moved).read_lineage()]
    trained = [Recorded.parse(entry, moved).environment for entry in environments]
    tolerance = max(
        tolerance_between(before, now, same_machine=True) for before, now in pairwise(trained)
    )
    return RoundTrip(home, abroad, cut, len(steps), deviation, tolerance)


def _tell(narrator: Narrator, moved: Path, trip: RoundTrip) -> None:
    proofs = [e for e in Run.open(moved).read_events() if e["kind"] == "continuation_proven"]
    ways: Sequence[str] = (f"{trip.home} to {trip.abroad}", f"{trip.abroad} to {trip.home}")
    rows = [
        (f"certificate, {way}, step {proof['step']:,}", str(proof["result"]))
        for way, proof in zip(ways, proofs, strict=False)
    ]
    rows.append((
        f"losses of {trip.steps} logged steps",
        f"at most {trip.deviation:.1e} from the run that stayed; {trip.tolerance:.0e} is allowed",
    ))  # fmt: skip
    narrator.table("moved", rows)
