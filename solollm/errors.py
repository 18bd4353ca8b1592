"""The one tree of errors a user can meet, each with the exit code the command line ends with.

    SoloLLMError                1   anything below
    ├── ConfigError             2   a setting, a flag or an argument is wrong
    ├── IntegrityError          3   a file is damaged, forged or not the one that was promised
    ├── PlanError               4   the model does not fit this machine
    ├── DataError               5   no usable data is left
    ├── BackendError            1   no backend, a wrong framework version, a failure inside one
    │   └── RankLost            1   another process of a run on several has ended, or hangs
    ├── StorageError           74   the disk is full or failing
    ├── RunLocked               1   another process writes this run
    └── Stopped                75   ended on purpose after a checkpoint: run again to resume
        └── StoppedBySignal  128+n  the same, asked for by SIGINT (130) or SIGTERM (143)

A message has three parts: what happened (with the values), why, what to do next. Library code
raises; only `solollm.commands` prints and exits. `assert` is for our own bugs.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class SoloLLMError(Exception):
    """An error with its three parts: `what` happened, `why`, and the `fix` to try next."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__("; ".join(part for part in (what, why, fix) if part))
        self.what = what
        self.why = why
        self.fix = fix


class ConfigError(SoloLLMError):
    """A setting, a flag or an argument that cannot be used."""

    exit_code = 2


class IntegrityError(SoloLLMError):
    """A file that is damaged, hostile, or not the one its manifest promised."""

    exit_code = 3


class PlanError(SoloLLMError):
    """A model and settings that this machine cannot hold."""

    exit_code = 4


class DataError(SoloLLMError):
    """Nothing usable is left of the data."""

    exit_code = 5


class BackendError(SoloLLMError):
    """No backend here, or a failure inside one."""


class RankLost(BackendError):
    """A run on several processes has lost one of them; none can go on alone. `is_told`: the user
    hears of it elsewhere, from rank 0 or in the run's events."""

    def __init__(self, why: str, *, is_told: bool = False) -> None:
        super().__init__(
            "another process of this run has ended, or hangs",
            why=why,
            fix="its own messages say why; `solollm resume` under the same launcher goes on",
        )
        self.is_told = is_told


@contextmanager
def rank_lost_on(signs: Sequence[str]) -> Iterator[None]:
    """Raise RankLost for a RuntimeError that says one of `signs`: frameworks have no type of their
    own for a process that is gone."""
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in signs):
            raise RankLost(str(error).splitlines()[0][:300]) from error
        raise


class StorageError(SoloLLMError):
    """The disk is full, read-only or failing; what existed before is still there."""

    exit_code = 74


class RunLocked(SoloLLMError):
    """Another living process is writing this run."""


class Stopped(SoloLLMError):
    """The run ended on purpose after a checkpoint; running again resumes it."""

    exit_code = 75


class StoppedBySignal(Stopped):
    """`Stopped`, because SIGINT or SIGTERM asked for it. Ends with 128 + the signal number."""

    def __init__(self, what: str, *, signal_number: int, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.exit_code = 128 + signal_number


def quoted(path: object) -> str:
    """A path as a shell and a command take it, for commands that a message tells to type."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def printable(text: object) -> str:
    """Text without the characters that would steer a terminal: a model, a file's name and a file's
    content can hold any."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text or ""))


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean `x`?' for a misspelt name, or the empty string if nothing is close."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"did you mean `{match[0]}`?" if match else ""
