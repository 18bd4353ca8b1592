"""The receiving end of `solollm runs push`: a script for the other machine's own Python.

It is sent over ssh as text, with a request behind it, so the other machine needs Python 3.8 or
newer and nothing of SoloLLM. Files arrive in `.push-<run>` of the project folder; what is there
already under its final name is shared instead of sent. Nothing gets its final name before every
byte in there is proven, and then a new run appears whole; one that was pushed before gets its new
checkpoints first and its run.toml last. `solollm.pushing` is the sending end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ANSWER = "solollm-answer "  # a login script may print before it
RUN_FILES = ("plan.json", "lineage.json", "metrics.jsonl", "events.jsonl", "run.toml")


class Request:
    """What is asked, and where it is about."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.files: dict[str, dict[str, Any]] = fields["files"]  # path: bytes, sha256
        self.corpora: dict[str, str] = fields["corpora"]  # name: fingerprint
        self.models: list[str] = fields["models"]  # their names say their content
        self.born: str = fields["born"]
        self.step: int = fields["step"]
        self.name: str = fields["run"]
        # Absolute, and links resolved: what rsync is then told.
        self.folder = Path(fields["folder"]).expanduser().resolve()
        self.staging = self.folder / (".push-" + self.name)
        self.run = self.folder / "runs" / self.name
        self.present: tuple[str, ...] | None = None  # see `whole_here`

    @property
    def beside(self) -> list[str]:
        """The folders that the run needs beside its own."""
        return [*("corpora/" + n for n in self.corpora), *("models/" + n for n in self.models)]


def main(fields: dict[str, Any]) -> None:
    """Answer one request as a line of JSON."""
    request = Request(fields)
    answer = {"receive": receive, "finish": finish}[fields["do"]](request)
    answer["folder"] = str(request.folder)
    sys.stdout.write("\n" + ANSWER + json.dumps(answer) + "\n")


def receive(request: Request) -> dict[str, Any]:
    """What is missing here, after making room for it: `missing` paths, or a `problem`."""
    problem = why_not(request)
    if problem:
        return {"problem": problem}
    present = whole_here(request)
    request.staging.mkdir(parents=True, exist_ok=True)
    forget_strangers(request)
    missing = []
    for path in request.files:
        staged = request.staging / path
        if path.startswith(present) or is_right(request, path, staged):
            continue
        drop_unless_partial(request, path, staged)
        staged.parent.mkdir(parents=True, exist_ok=True)
        if is_right(request, path, request.folder / path):
            share(request.folder / path, staged)
        else:
            missing.append(path)
    needed = sum(request.files[path]["bytes"] for path in missing)
    free = shutil.disk_usage(request.folder).free
    if needed > free:
        return {"problem": f"{needed:,} bytes are needed there and {free:,} are free"}
    return {"missing": missing, "rsync": bool(shutil.which("rsync"))}


def finish(request: Request) -> dict[str, Any]:
    """Prove every file that arrived, then give them their final names; `wrong` paths are deleted
    and must be sent again."""
    forget_strangers(request)
    present = whole_here(request)
    expected = [path for path in request.files if not path.startswith(present)]
    wrong = [path for path in expected if not is_right(request, path, request.staging / path)]
    for path in wrong:
        remove(request.staging / path)
    if wrong:
        return {"wrong": wrong}
    problem = why_not(request)
    if problem:
        return {"problem": problem}
    flush(request.staging)
    for place in request.beside:
        if (request.staging / place).is_dir():
            give_name(request.staging / place, request.folder / place)
    place_run(request, request.staging / "runs" / request.name)
    shutil.rmtree(request.staging)
    return {"wrong": []}


def place_run(request: Request, arrived: Path) -> None:
    """A new run gets its name whole; one that is here gets new checkpoints and samples, then new
    files."""
    if not request.run.exists():
        give_name(arrived, request.run)
        return
    samples = [arrived / "data"] if (arrived / "data").is_dir() else []
    for folder in [*samples, *sorted((arrived / "checkpoints").iterdir())]:
        place = request.run / folder.relative_to(arrived)
        aside = place.with_name(".old-" + os.urandom(4).hex() + "-" + folder.name)
        if place.exists():
            place.rename(aside)  # a crash here is mended by the next resume
        give_name(folder, place)
        shutil.rmtree(aside, ignore_errors=True)
    for name in RUN_FILES:
        if (arrived / name).exists():
            (arrived / name).replace(request.run / name)
    flush_one(request.run)


def why_not(request: Request) -> str:
    """Why this run must not come here; empty if it may."""
    for name, fingerprint in request.corpora.items():
        place = request.folder / "corpora" / name
        if place.exists():
            index = read_json(place / "index.json")
            found = index.get("fingerprint") if isinstance(index, dict) else None
            if found != fingerprint:
                return f"{place} is another corpus (fingerprint {found}, the run's {fingerprint})"
    for name in request.beside:
        is_sent = any(path.startswith(name + "/") for path in request.files)
        if is_sent and (request.folder / name).exists() and name + "/" not in whole_here(request):
            return f"{request.folder / name} is damaged"
    if not request.run.exists():
        return ""
    if is_locked(request.run / "lock"):
        return f"{request.run} is being trained there"
    lineage = read_json(request.run / "lineage.json")
    born = lineage[0].get("time") if isinstance(lineage, list) and lineage else ""
    if born != request.born:
        return f"{request.run} is another run (begun {born or 'at an unknown time'})"
    newest = newest_step(request.run / "checkpoints")
    if newest > request.step:
        return f"{request.run} is at step {newest}, ahead of step {request.step}"
    return ""


def whole_here(request: Request) -> tuple[str, ...]:
    """The path prefixes of corpora and models that are here whole, so that nothing of them is sent.
    Read once: they may be large."""
    if request.present is None:
        found = []
        for name in request.beside:
            paths = [path for path in request.files if path.startswith(name + "/")]
            if paths and all(is_right(request, path, request.folder / path) for path in paths):
                found.append(name + "/")
        request.present = tuple(found)
    return request.present


def forget_strangers(request: Request) -> None:
    """Delete what is in the staging folder and not in the request: an earlier push left it, or it
    lay beside the files that were sent."""
    for path in sorted(request.staging.rglob("*"), reverse=True):  # what is in a folder before it
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(request.staging).as_posix() not in request.files:
            path.unlink()


def drop_unless_partial(request: Request, path: str, staged: Path) -> None:
    """A shorter file is the beginning of the right one, and rsync goes on with it."""
    is_file = staged.is_file() and not staged.is_symlink()
    if not (is_file and staged.stat().st_size < request.files[path]["bytes"]):
        remove(staged)


def is_right(request: Request, path: str, place: Path) -> bool:
    """Whether the regular file at `place` is what the request says of `path`."""
    record = request.files[path]
    if place.is_symlink() or not place.is_file() or place.stat().st_size != record["bytes"]:
        return False
    state = hashlib.sha256()
    with place.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 22), b""):
            state.update(piece)
    return bool(state.hexdigest() == record["sha256"])


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of a run."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def newest_step(checkpoints: Path) -> int:
    """The step of the newest finished checkpoint; -1 if there is none."""
    finished = [path.parent.name for path in checkpoints.glob("step-*/manifest.json")]
    return max((int(name[5:]) for name in finished if name[5:].isdigit()), default=-1)


def share(source: Path, target: Path) -> None:
    """A second name for a finished file, or a copy where there are none."""
    try:
        os.link(str(source), str(target))
    except OSError:
        shutil.copy2(str(source), str(target))


def give_name(arrived: Path, final: Path) -> None:
    """Move a flushed folder to where it belongs."""
    final.parent.mkdir(parents=True, exist_ok=True)
    arrived.rename(final)
    flush_one(final.parent)


def flush(folder: Path) -> None:
    """Bring every file and name in `folder` to the medium."""
    for path in [*folder.rglob("*"), folder]:
        flush_one(path)


def flush_one(path: Path) -> None:
    """Bring a file's data, or a directory's names, to the medium."""
    fd = os.open(str(path), os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path) -> Any:
    """The content, or None where there is none to read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remove(path: Path) -> None:
    """Delete whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(str(path))
    elif path.exists() or path.is_symlink():
        path.unlink()
