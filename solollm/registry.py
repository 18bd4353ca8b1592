"""Which backends are installed, which can run here, and which one is taken.

Backends announce themselves by the entry-point group `solollm.backends`. They are asked with
`Backend.probe()`, which imports no framework; only the chosen one is constructed. Order: the name
asked for, then the environment variable SOLOLLM_BACKEND, then the highest priority.
"""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from solollm.backend import Backend, Probe
from solollm.errors import BackendError, ConfigError, nearest
from solollm.hardware import Machine, read_machine

GROUP = "solollm.backends"
VARIABLE = "SOLOLLM_BACKEND"


class Candidate(NamedTuple):
    """An installed backend and what its probe said. `factory` is None where loading failed."""

    name: str
    probe: Probe
    factory: type[Backend] | None


class Selected(NamedTuple):
    """The backend to use, and one sentence saying why this one."""

    backend: Backend
    reason: str


def find_backends() -> list[Candidate]:
    """Every installed backend, probed, the preferred first. A broken one is listed, not raised."""
    found = [_probe(point) for point in entry_points(group=GROUP)]
    return sorted(found, key=lambda c: (not c.probe.available, -c.probe.priority, c.name))


def select_backend(name: str = "auto") -> Selected:
    """The backend to run on.

    Raises:
        ConfigError: no backend of that name is installed.
        BackendError: the backend asked for, or every backend, cannot run here.
    """
    asked, source = name, "asked for"
    if name == "auto" and os.environ.get(VARIABLE):
        asked, source = os.environ[VARIABLE], f"{VARIABLE} is set"
    candidates = find_backends()
    if asked == "auto":
        return _preferred(candidates)
    by_name = {candidate.name: candidate for candidate in candidates}
    chosen = by_name.get(asked)
    if chosen is None:
        installed = ", ".join(by_name) or "none"
        raise ConfigError(
            f"unknown backend {asked!r} ({source})",
            why=f"installed: {installed}",
            fix=nearest(asked, by_name) or "use `auto`, or install that backend's package",
        )
    if chosen.factory is None or not chosen.probe.available:
        raise BackendError(
            f"backend `{asked}` cannot run here ({source})",
            why=chosen.probe.reason,
            fix="`solollm doctor` lists what is missing",
        )
    return Selected(chosen.factory(), f"`{asked}` on {chosen.probe.device}: {source}")


def missing_backend_fix(machine: Machine) -> str:
    """What to do on a machine where no backend runs; a command wherever one exists."""
    if machine.is_translated:
        return (
            "this Python runs translated (Rosetta): install an arm64 Python,"
            " then `python3 tools/quickstart.py` installs MLX"
        )
    if machine.is_intel_mac:
        return (
            "an Intel Mac has no backend: current PyTorch and MLX publish nothing for it;"
            " use an Apple silicon Mac or Linux"
        )
    if any(gpu.vendor == "apple" for gpu in machine.gpus):
        return "run `pip install 'solollm[mlx]'` in this environment"
    return "run `pip install 'torch>=2.11,<2.14'` in this environment"


def _preferred(candidates: list[Candidate]) -> Selected:
    usable = [c for c in candidates if c.probe.available and c.factory is not None]
    if not usable:
        reasons = "; ".join(f"{c.name}: {c.probe.reason}" for c in candidates)
        raise BackendError(
            "no backend can run here",
            why=reasons or "no backend package is installed",
            fix=missing_backend_fix(read_machine()),
        )
    best, *others = usable
    assert best.factory is not None
    reason = f"`{best.name}` on {best.probe.device}"
    if others:
        reason += f": preferred over {', '.join(c.name for c in others)}"
    return Selected(best.factory(), reason)


def _probe(point: EntryPoint) -> Candidate:
    try:
        factory: type[Backend] = point.load()
        return Candidate(point.name, factory.probe(), factory)
    except Exception as error:  # a third party's package: one that is broken must not stop the rest
        reason = f"its package does not load ({type(error).__name__}: {error})"
        return Candidate(point.name, Probe(False, reason, "", 0), None)
