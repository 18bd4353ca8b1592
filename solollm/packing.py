"""A run packed into one file, and unpacked where it goes on.

What is in the file and where it lands stands in `solollm.bundle`, its bytes in `solollm.archive`,
what a run takes along in `solollm.cargo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from solollm.archive import ArchiveReader, write_archive
from solollm.bases import require_base
from solollm.bundle import Bundle
from solollm.cargo import gathered
from solollm.checkpoint import CERTIFICATE
from solollm.data.shards import INDEX_NAME, read_index, verify_corpus
from solollm.durable import make_directory, require_space, staged_directory
from solollm.errors import ConfigError, IntegrityError
from solollm.strictfile import parse_json, read_bytes, refused
from solollm.tensorfile import TensorFile


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote. `base`: that of an adapter, if it came along, else ""."""

    archive: Path
    archive_bytes: int
    step: int
    num_files: int
    corpora: tuple[str, ...]
    base: str
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Unpacked:
    """Where a run is now. `missing` names corpora that it reads, and a base that it is beside, that
    are not here."""

    run: Path
    step: int
    num_files: int
    corpora: tuple[Path, ...]
    missing: tuple[Path, ...]


def pack(
    run: Path, archive: Path, *, with_corpus: bool = True, with_base: bool = True,
    step: int | None = None, backend: str = "auto",
) -> Packed:  # fmt: skip
    """Write a run into the new file `archive`: its newest intact checkpoint (or that of `step`),
    the best one, logs and lineage, and the corpus it reads; of a fine-tuning its samples, and the
    base of an adapter.

    `backend` is what a session is opened on, if the checkpoint does not yet say what comes next.

    Raises:
        ConfigError: no run, no such checkpoint, or `archive` exists.
        IntegrityError: a checkpoint or the corpus is damaged. RunLocked: the run is being trained.
        StorageError, BackendError, PlanError.
    """
    if archive.exists():
        raise ConfigError(
            f"{archive} exists", why="nothing is written over", fix="choose another name"
        )
    with gathered(
        run, with_corpus=with_corpus, with_base=with_base, step=step, backend=backend
    ) as cargo:
        size = write_archive(archive, cargo.bundle, cargo.sources)
    bundle = cargo.bundle
    held = tuple(name for name in bundle.corpora if bundle.holds_corpus(name))
    return Packed(
        archive=archive, archive_bytes=size, step=bundle.step, num_files=len(bundle.files),
        corpora=held, base=next(filter(bundle.holds_model, bundle.models), ""),
        skipped=cargo.skipped,
    )  # fmt: skip


def unpack(archive: Path, folder: Path) -> Unpacked:
    """Put a packed run into the project folder `folder`: `runs/<run>`, `corpora/<corpus>` and
    `models/<base>`. Every byte is proven before any of them appears. A corpus or base that is there
    already is used.

    Raises:
        IntegrityError: the archive is damaged or forged; names the file, and the tensor where it
            is one. Nothing was changed.
        ConfigError: no such archive; a run, or another corpus or base, of that name is there.
        StorageError: from the disk.
    """
    if not archive.exists():
        raise ConfigError(f"{archive} does not exist", fix="check the path")
    with ArchiveReader(archive) as reader, ExitStack() as stack:
        bundle = reader.bundle
        final = folder / bundle.run_folder
        if final.exists():
            raise ConfigError(
                f"{final} exists",
                why="nothing is written over",
                fix="unpack into another folder, or move that run away",
            )
        present = {f"corpora/{name}" for name in bundle.corpora if _is_here(bundle, name, folder)}
        present |= {f"models/{n}" for n in bundle.models if _is_base_here(bundle, n, folder)}
        held = {f"corpora/{name}" for name in bundle.corpora if bundle.holds_corpus(name)}
        held |= {f"models/{name}" for name in bundle.models if bundle.holds_model(name)}
        make_directory(folder)
        require_space(folder, bundle.total_bytes)
        # Left in reverse: the run gets its name last, so that it never lacks what it needs.
        staged = {bundle.run_folder: stack.enter_context(staged_directory(final))}
        for place in sorted(held - present):
            staged[place] = stack.enter_context(staged_directory(folder / place))

        def target(path: str) -> Path | None:
            parts = PurePosixPath(path).parts
            root = staged.get("/".join(parts[:2]))
            if root is None:
                return None
            place = root.joinpath(*parts[2:])
            place.parent.mkdir(parents=True, exist_ok=True)
            return place

        damaged = reader.extract(target)
        if damaged:
            raise _first_damage(damaged, archive, target)
        for place, arrived in staged.items():
            _require_promised(bundle, place, arrived)
    here = [folder / "corpora" / name for name in bundle.corpora]
    needed = [*here, *(folder / "models" / name for name in bundle.models)]
    return Unpacked(
        run=final, step=bundle.step, num_files=len(bundle.files),
        corpora=tuple(place for place in here if place.exists()),
        missing=tuple(place for place in needed if not place.exists()),
    )  # fmt: skip


def _is_here(bundle: Bundle, name: str, folder: Path) -> bool:
    """Whether that corpus is in the folder already. Raises ConfigError for another one."""
    place = folder / "corpora" / name
    if not place.exists():
        return False
    index = read_index(place)
    if index.fingerprint != bundle.corpora[name]:
        raise ConfigError(
            f"{place} is another corpus than the run's",
            why=f"its fingerprint is {index.fingerprint}, the run's {bundle.corpora[name]}",
            fix="unpack into another folder, or move that corpus away",
        )
    verify_corpus(place)
    return True


def _is_base_here(bundle: Bundle, name: str, folder: Path) -> bool:
    """Whether that base is in the folder already. Raises ConfigError for another one."""
    place = folder / "models" / name
    if not place.exists():
        return False
    try:
        require_base(place, bundle.models[name])
    except IntegrityError as error:
        raise ConfigError(
            f"{place} is not the run's base", why=error.why or error.what,
            fix="unpack into another folder, or move that model away",
        ) from error  # fmt: skip
    return True


def _require_promised(bundle: Bundle, path: str, place: Path) -> None:
    """Raise IntegrityError unless a corpus or base that arrived is the one that the run needs."""
    kind, name = path.split("/")
    if kind == "models":
        require_base(place, bundle.models[name])
    elif kind == "corpora":
        _require_corpus(bundle, name, place)


def _require_corpus(bundle: Bundle, name: str, place: Path) -> None:
    found = read_index(place).fingerprint
    if found != bundle.corpora[name]:
        reason = f"has fingerprint {found}, the run reads {bundle.corpora[name]}"
        raise refused(place, INDEX_NAME, reason)


def _first_damage(
    damaged: Mapping[str, IntegrityError], archive: Path, target: Any
) -> IntegrityError:
    """The error for the first damaged file, with the tensor where it is one."""
    name, error = next(iter(damaged.items()))
    place = target(name)
    if place is None or not (place.parent / CERTIFICATE).is_file():
        return error  # not of a checkpoint
    if not name.endswith(".safetensors"):
        return error
    try:
        tensor = _damaged_tensor(place)
    except IntegrityError as told:
        return refused(archive, name, told.why)
    return refused(archive, f"{name}, tensor {tensor!r}", "is damaged") if tensor else error


def _damaged_tensor(path: Path) -> str:
    """The first tensor of a file that is not as its checkpoint's certificate says."""
    certificate: Any = parse_json(read_bytes(path.parent / CERTIFICATE), path)
    expected = {**certificate["parameters"], **certificate["optimizer"]}
    with TensorFile(path) as file:
        found = file.digests()
    return next((name for name, digest in found.items() if expected.get(name) != digest), "")
