"""The catalogue, and the verdict on each of its faults. `solollm verify faults` prints it."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from solollm.config import RunConfig
from solollm.errors import ConfigError, SoloLLMError, nearest
from solollm.fault_proof import (
    by_damage,
    by_data,
    by_disks,
    by_machine,
    by_numbers,
    by_signals,
)
from solollm.fault_proof.ground import STEPS, Base, Fault, Ground, make_base
from solollm.fault_proof.lives import CannotBeProvoked, Nursery, PromiseBroken, StartMethod
from solollm.horizon import updated
from solollm.registry import select_backend
from solollm.resume_proof import tiny_training

FAULTS: tuple[Fault, ...] = (
    *by_signals.FAULTS, *by_disks.FAULTS, *by_damage.FAULTS, *by_data.FAULTS, *by_numbers.FAULTS,
    *by_machine.FAULTS,
)  # fmt: skip


class Outcome(NamedTuple):
    """How one fault ended. `seen`: what was found, the broken promise, or why it cannot be provoked
    here; `folder` holds the runs and what every process said, and is there for a broken one."""

    fault: Fault
    verdict: Literal["ok", "failed", "skipped"]
    seen: str
    seconds: float
    folder: Path


def chosen_faults(names: Collection[str]) -> Sequence[Fault]:
    """The faults of these names, all where there is none. Raises ConfigError for an unknown one."""
    known = {fault.name: fault for fault in FAULTS}
    for name in names:
        if name not in known:
            fix = nearest(name, known) or "`solollm verify faults --list` names them"
            raise ConfigError(f"there is no fault {name!r} in the catalogue", fix=fix)
    return [fault for fault in FAULTS if not names or fault.name in names]


def training_for_faults(folder: Path, backend: str = "auto") -> RunConfig:
    """The training in miniature that faults are provoked on, with its corpus in `folder`."""
    chosen = select_backend(backend).backend
    config = tiny_training(folder, steps=STEPS).model_copy(update={"backend": chosen.name})
    if "muon" not in chosen.capabilities().optimizers:
        config = updated(config, "optimizer", name="adamw")
    return config


def prove_faults(
    config: RunConfig,
    folder: Path,
    *,
    faults: Sequence[Fault] = FAULTS,
    start_method: StartMethod | None = None,
) -> Iterator[Outcome]:
    """Provoke each of the faults under `folder`, on copies of one run, and say how it ended. How
    long the run is and when it saves is the proof's; all else is `config`'s.

    "forkserver", where nothing speaks against it, forks every process from one that has imported
    the framework; "spawn" gives each a fresh interpreter.

    Raises:
        BackendError: the training fails without any fault.
    """
    # Apple's frameworks do not bear a fork.
    nursery = Nursery(start_method or ("spawn" if sys.platform == "darwin" else "forkserver"))
    base = make_base(config, folder / "base", nursery)
    for fault in faults:
        yield provoke(fault, folder / fault.name, base, nursery)


def provoke(fault: Fault, folder: Path, base: Base, nursery: Nursery) -> Outcome:
    """Provoke one fault in the new folder `folder`, which goes again unless the promise broke."""
    folder.mkdir()
    begun = time.monotonic()
    verdict: Literal["ok", "failed", "skipped"] = "ok"
    try:
        seen = fault.provoke(Ground(folder, base, nursery))
    except CannotBeProvoked as reason:
        verdict, seen = "skipped", str(reason)
    except PromiseBroken as broken:
        verdict, seen = "failed", str(broken)
    except (SoloLLMError, OSError, ValueError, KeyError) as error:
        # What a run left cannot even be looked at: that is no failure of the proof alone.
        verdict, seen = "failed", f"{type(error).__name__}: {error}"
    if verdict != "failed":
        shutil.rmtree(folder)
    return Outcome(fault, verdict, seen, time.monotonic() - begun, folder)
