"""What moves when a run moves: a list of files with sizes and digests, sealed by its own.

The paths are those of a project folder, so that an archive unpacked or a run pushed lands where
everything else expects it:

    runs/<run>/run.toml plan.json lineage.json metrics.jsonl events.jsonl
    runs/<run>/checkpoints/step-00001000/...
    runs/<run>/data/samples.json ...          of a fine-tuning
    corpora/<corpus>/index.json train/... validation/... tokenizer/... report.json
    models/<name>-<content>/config.json ...   the base of an adapter

`run.toml` finds its corpus and its base from there by relative paths. No path is absolute, none
leads out, and whatever is not of this shape is refused. How files travel: `solollm.archive`,
`solollm.pushing`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from solollm.certificate import Digest
from solollm.manifest import refuse_newer
from solollm.model_folder import CONFIG
from solollm.strictfile import encode_json, parse_json, refused
from solollm.tensorfile import is_flat_name

BUNDLE = "bundle.json"
RUN_FILES = ("plan.json", "lineage.json", "metrics.jsonl", "events.jsonl", "run.toml")
MAX_BYTES = 1 << 24
_MAX_DEPTH = 5
_MAX_NAME = 80  # of a run or corpus: with it every path fits into a tar header
_MAX_FILES = 10_000


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Value):
    """What a file must be."""

    bytes: int = Field(ge=0, le=2**53)
    sha256: Digest


class Bundle(_Value):
    """`bundle.json`. `step` is the checkpoint a resume goes on from; `corpora`: name to fingerprint
    of every corpus the run reads, whether it is in the bundle or not; `models`: the same of the
    base of an adapter, by its content; `digest` seals the rest."""

    format: Literal["solollm-bundle"] = "solollm-bundle"
    format_version: Literal[1] = 1
    run: str
    step: Annotated[int, Field(ge=0, le=2**53)]
    corpora: Mapping[str, str]
    models: Mapping[str, Digest] = {}
    files: Mapping[str, FileRecord]
    digest: str = ""

    @property
    def total_bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @property
    def run_folder(self) -> str:
        return f"runs/{self.run}"

    def holds_corpus(self, name: str) -> bool:
        return f"corpora/{name}/index.json" in self.files

    def holds_model(self, name: str) -> bool:
        return f"models/{name}/{CONFIG}" in self.files


def seal(bundle: Bundle) -> Bundle:
    """The bundle with its digest."""
    return bundle.model_copy(update={"digest": _digest(bundle)})


def encode(bundle: Bundle) -> bytes:
    """The bytes of `bundle.json`. Where there is no base nothing is said of models, as it was
    before adapters could travel."""
    table = bundle.model_dump(mode="json")
    if not bundle.models:
        del table["models"]
    return encode_json(table)


def parse(content: bytes, place: Path) -> Bundle:
    """Read a `bundle.json`. `place` is named in errors.

    Raises:
        IntegrityError: damaged, of a newer format, or with a path that must not be.
    """
    table: Any = parse_json(content, place)
    if not isinstance(table, dict) or table.get("format") != "solollm-bundle":
        raise refused(place, BUNDLE, "is no list of a moved run")
    refuse_newer(table, place)
    try:
        bundle = Bundle.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise refused(place, f"{BUNDLE} {where}", first["msg"]) from error
    if encode(bundle) != content or bundle.digest != _digest(bundle):
        raise refused(place, BUNDLE, "is not as it was written (its own digest differs)")
    _check_names(bundle, place)
    return bundle


def is_movable(name: str) -> bool:
    """Whether a run or corpus of that name can travel: a plain name on every file system."""
    return is_flat_name(name) and not name.startswith(".") and len(name) <= _MAX_NAME


def _digest(bundle: Bundle) -> str:
    return hashlib.sha256(encode(bundle.model_copy(update={"digest": ""}))).hexdigest()


def _check_names(bundle: Bundle, place: Path) -> None:
    """Raise IntegrityError unless every name stays where it belongs, on every file system."""
    for name in (bundle.run, *bundle.corpora, *bundle.models):
        if not is_movable(name):
            raise refused(place, f"name {name[:80]!r}", "is no plain folder name")
    if len(bundle.files) > _MAX_FILES:
        raise refused(place, "files", f"more than {_MAX_FILES}")
    folders = {("runs", bundle.run), *(("corpora", name) for name in bundle.corpora)}
    folders |= {("models", name) for name in bundle.models}
    seen: set[str] = set()
    for path in bundle.files:
        parts = path.split("/")
        if not all(is_flat_name(part) and not part.startswith(".") for part in parts):
            raise refused(place, f"path {path[:120]!r}", "leads out of its folder")
        if (*parts[:2],) not in folders or not 3 <= len(parts) <= _MAX_DEPTH:
            raise refused(place, f"path {path[:120]!r}", "is outside the run and what it needs")
        if path.lower() in seen:  # macOS takes two spellings for one file
            raise refused(place, f"path {path[:120]!r}", "stands twice")
        seen.add(path.lower())
    for path in seen:
        parents = {parent.as_posix() for parent in PurePosixPath(path).parents}
        if parents & seen:
            raise refused(place, f"path {path[:120]!r}", "lies below another file")
    if f"{bundle.run_folder}/run.toml" not in bundle.files:
        raise refused(place, "files", "the run's run.toml is missing")
