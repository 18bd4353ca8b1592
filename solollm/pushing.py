"""A run sent to another machine: rsync over ssh, proven there before it has a name.

The same files as in a packed run (`solollm.cargo`) go into a staging folder on the other side,
directory by directory, and what arrived in part is gone on with. `solollm.far_side`, which runs
there, tells what is missing, proves what came, and puts it in place. The other machine needs ssh,
rsync and any Python 3; only flags that every rsync knows are used (macOS has openrsync).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from solollm import far_side
from solollm.archive import Source
from solollm.bundle import Bundle
from solollm.cargo import Cargo, gathered
from solollm.errors import ConfigError, IntegrityError, SoloLLMError, Stopped, StorageError
from solollm.runs import Run

_HOST = re.compile(r"(?!-)[A-Za-z0-9_.@%-]+")
_FOLDER = re.compile(r"(?!-)[A-Za-z0-9_./~+@%=,-]+")  # what no remote shell takes for more
_SSH_OPTIONS = (
    "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15",
    "-o", "ServerAliveCountMax=4",
)  # fmt: skip
_FAR_DISK = 11  # rsync's exit code for "error in file I/O"
_BROKEN = {10, 12, 19, 20, 30, 35, 255}  # sockets, protocol stream, signals, time limits, ssh


class Target(NamedTuple):
    """Where to: `user@host` as ssh takes it, and a project folder there."""

    host: str
    folder: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """From `user@host:folder`. Raises ConfigError."""
        host, colon, folder = text.partition(":")
        if not colon or not _HOST.fullmatch(host) or not _FOLDER.fullmatch(folder):
            raise ConfigError(
                f"{text!r} is no place to push to",
                why="it must be user@host:folder, without blanks and other special characters",
                fix="for example ada@studio.local:models; other ports and keys: ~/.ssh/config",
            )
        return cls(host, folder)


@dataclass(frozen=True)
class Pushed:
    """What `push` did. `run` is its path on the other machine; what was there already was not
    sent."""

    host: str
    run: str
    step: int
    num_files: int
    sent_files: int
    sent_bytes: int
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Programs:
    """The two programs, as commands."""

    ssh: Sequence[str] = ("ssh",)
    rsync: Sequence[str] = ("rsync",)

    def require(self) -> None:
        """Raise SoloLLMError if one is not installed."""
        for name in (self.ssh[0], self.rsync[0]):
            if shutil.which(name) is None:
                raise SoloLLMError(
                    f"`{name}` is not installed on this machine",
                    why="a run is pushed by rsync over ssh",
                    fix=f"install {name}, or use `solollm runs pack` and carry the file over",
                )

    @property
    def quiet_ssh(self) -> list[str]:
        """ssh that never asks and notices a dead connection."""
        return [*self.ssh, *_SSH_OPTIONS]


def push(
    run: Path, target: str, *, with_corpus: bool = True, with_base: bool = True,
    backend: str = "auto", programs: Programs | None = None,
    on_send: Callable[[str, int], None] = lambda name, size: None,
) -> Pushed:  # fmt: skip
    """Send a run to `user@host:folder`, where it lands as `folder/runs/<run>`,
    `folder/corpora/<corpus>` and `folder/models/<base>`; `on_send` hears of each directory and its
    bytes before it goes.

    Raises:
        Stopped: the connection broke; the same call goes on where this one ended.
        IntegrityError: something is damaged, here or there.
        ConfigError: no such run, an unusable target, or another or newer run of that name there.
        SoloLLMError: a program is missing, the other machine cannot be reached or refuses the key.
        RunLocked, StorageError, BackendError, PlanError.
    """
    programs, place = programs or Programs(), Target.parse(target)
    programs.require()
    with gathered(run, with_corpus=with_corpus, with_base=with_base, backend=backend) as cargo:
        request = _request(cargo, place.folder, Run.open(run).read_lineage())
        far = _FarSide(place.host, programs)
        answer = far.ask({**request, "do": "receive"}, is_first=True)
        missing = _checked_answer(answer, place)
        staging = f"{answer['folder']}/.push-{cargo.bundle.run}"
        far.send(cargo, missing, staging, on_send)
        answer = far.ask({**request, "do": "finish"})
        _checked_answer(answer, place)
    sizes = [cargo.bundle.files[path].bytes for path in missing]
    return Pushed(
        host=place.host,
        run=f"{answer['folder']}/{cargo.bundle.run_folder}",
        step=cargo.bundle.step,
        num_files=len(cargo.bundle.files),
        sent_files=len(missing),
        sent_bytes=sum(sizes),
        skipped=cargo.skipped,
    )


class _FarSide:
    """The other machine."""

    def __init__(self, host: str, programs: Programs) -> None:
        self._host = host
        self._programs = programs

    def ask(self, request: Mapping[str, Any], *, is_first: bool = False) -> dict[str, Any]:
        """Run `solollm.far_side` there with a request; its answer."""
        source = Path(far_side.__file__).read_text(encoding="utf-8")
        script = f"{source}\n\nmain(json.loads({json.dumps(request)!r}))\n"
        done = subprocess.run(
            [*self._programs.quiet_ssh, self._host, "python3 -"],
            input=script.encode(), capture_output=True, check=False,
        )  # fmt: skip
        said = done.stderr.decode("utf-8", "replace").strip()
        if done.returncode == 0:
            for line in reversed(done.stdout.decode("utf-8", "replace").splitlines()):
                if line.startswith(far_side.ANSWER):
                    answer: dict[str, Any] = json.loads(line.removeprefix(far_side.ANSWER))
                    return answer
        if done.returncode == 255:
            raise self._unreachable(said) if is_first else self._broken(said)
        if done.returncode in (126, 127):
            fix = "install Python 3 there; SoloLLM needs it too"
            raise SoloLLMError(f"{self._host} has no `python3`", why=_last_line(said), fix=fix)
        raise SoloLLMError(
            f"{self._host} could not take the run", why=_last_line(said) or "it gave no answer"
        )

    def send(
        self,
        cargo: Cargo,
        missing: Sequence[str],
        staging: str,
        on_send: Callable[[str, int], None],
    ) -> None:
        """Bring the missing files into the staging folder: what lies beside the run, then the
        checkpoints and samples, then the few files of the run. What was there already looks the
        same to rsync, and is not sent with the directory it is in."""
        if not _FOLDER.fullmatch(staging):
            raise ConfigError(
                f"{staging!r} on {self._host} cannot be pushed to",
                why="a blank or special character in a path does not survive every rsync",
                fix="choose a folder without them, or carry over what `solollm runs pack` writes",
            )
        with tempfile.TemporaryDirectory(prefix="solollm-push-") as written:
            for folder, paths in _groups(missing).items():
                on_send(folder, sum(cargo.bundle.files[path].bytes for path in paths))
                sources = {
                    _top(path, folder, cargo.sources[path], Path(written)): None for path in paths
                }
                self._rsync(list(sources), f"{staging}/{folder}/")

    def _rsync(self, sources: Sequence[Path], folder: str) -> None:
        shell = shlex.join(self._programs.quiet_ssh)
        done = subprocess.run(
            [*self._programs.rsync, "-rt", "--partial", "-e", shell,
             *map(str, sources), f"{self._host}:{folder}"],
            stdin=subprocess.DEVNULL, capture_output=True, check=False,
        )  # fmt: skip
        said = done.stderr.decode("utf-8", "replace").strip()
        if done.returncode == 0:
            return
        if done.returncode == _FAR_DISK:
            raise StorageError(
                f"the disk of {self._host} is full or failing", why=_last_line(said),
                fix="free some space there, and push again: it goes on where it ended",
            )  # fmt: skip
        if done.returncode < 0 or done.returncode in _BROKEN:
            raise self._broken(said)
        raise SoloLLMError(
            f"rsync to {self._host} failed (exit code {done.returncode})", why=_last_line(said)
        )

    def _unreachable(self, said: str) -> SoloLLMError:
        if "Permission denied" in said:
            what, fix = (
                f"{self._host} refuses this key",
                f"`ssh-copy-id {self._host}` puts yours there; a key with a passphrase needs"
                " ssh-agent",
            )
        elif "Host key verification failed" in said:
            what, fix = (
                f"the host key of {self._host} is unknown or has changed",
                f"connect once by hand and check its fingerprint: `ssh {self._host}`",
            )
        else:
            what, fix = f"{self._host} cannot be reached", f"try `ssh {self._host}` by hand"
        return SoloLLMError(what, why=_last_line(said), fix=fix)

    def _broken(self, said: str) -> Stopped:
        return Stopped(
            f"the connection to {self._host} broke off",
            why=_last_line(said),
            fix="push again: it goes on where it ended",
        )


def _request(cargo: Cargo, folder: str, lineage: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    bundle: Bundle = cargo.bundle
    return {
        "folder": folder,
        "run": bundle.run,
        "step": bundle.step,
        "born": lineage[0]["time"] if lineage else "",
        "corpora": dict(bundle.corpora),
        "models": list(bundle.models),
        "files": {path: record.model_dump() for path, record in bundle.files.items()},
    }


def _checked_answer(answer: Mapping[str, Any], place: Target) -> list[str]:
    """The missing files. Raises ConfigError, SoloLLMError, IntegrityError."""
    if answer.get("problem"):
        raise ConfigError(
            f"{place.host} does not take this run",
            why=str(answer["problem"]),
            fix="push into another folder there, or remove what is in the way",
        )
    if not answer.get("rsync", True):
        raise SoloLLMError(
            f"`rsync` is not installed on {place.host}",
            fix="install it there, or use `solollm runs pack` and carry the file over",
        )
    if answer.get("wrong"):
        raise IntegrityError(
            f"{len(answer['wrong'])} files arrived damaged on {place.host},"
            f" {answer['wrong'][0]} among them",
            why="their digests differ; they were deleted there, and nothing got its name",
            fix="push again: only these are sent",
        )
    return list(answer.get("missing", ()))


def _groups(paths: Sequence[str]) -> dict[str, list[str]]:
    """The paths by the folder that one rsync fills: a corpus, a model, a run's checkpoints or its
    samples, a run."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split("/")
        depth = 3 if parts[0] == "runs" and len(parts) > 3 else 2
        groups.setdefault("/".join(parts[:depth]), []).append(path)
    return groups


def _top(path: str, folder: str, source: Source, written: Path) -> Path:
    """What to name to rsync for `path` to arrive in `folder`: the file, or the directory below
    `folder` that holds it. Bytes are written down first."""
    if isinstance(source, bytes):
        place = written / PurePosixPath(path).name
        place.write_bytes(source)
        source = place
    below = PurePosixPath(path).relative_to(folder).parts
    return source.resolve().parents[len(below) - 2] if len(below) > 1 else source.resolve()


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else ""
