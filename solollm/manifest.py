"""The manifest of a directory: size and digest of every file, written last, checked before use.

A plain file is named by the sha256 of its bytes; a safetensors file by `tensors:`, the sha256 of
its header and its tensors' digests, so that the digests of a certificate prove the file without
another pass. The file has one spelling only: a manifest that differs from it by a bit is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from solollm import durable
from solollm.backend import HostTensor
from solollm.strictfile import encode_json, parse_json, read_bytes, refused
from solollm.tensorfile import TensorFile, file_digest, is_flat_name, write_tensors
from solollm.tensorheader import Spec, build_header

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_MAX_BYTES = 1 << 22
_DIGEST = re.compile(r"(sha256|tensors):[0-9a-f]{64}")


class Entry(NamedTuple):
    """What a file must be: its bytes, and `sha256:<hex>` or `tensors:<hex>`."""

    size_bytes: int
    digest: str


class ManifestWriter:
    """Fills a staged directory and remembers what went in; `finish` writes the manifest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, dict[str, int | str]] = {}

    def add(self, name: str, content: bytes) -> None:
        """Write a plain file."""
        self._take(name)
        with durable.create_file(self._folder / name, expected_bytes=len(content)) as file:
            file.write(content)
        self._enter(name, len(content), f"sha256:{hashlib.sha256(content).hexdigest()}")

    def add_json(self, name: str, value: Any) -> None:
        """Write a value as JSON."""
        self.add(name, encode_json(value))

    def adopt(self, name: str, source: Path, entry: Entry) -> None:
        """Take in a finished file of another directory, which is not copied where the file system
        allows it. `entry` is what that directory's manifest says of it."""
        self._take(name)
        durable.share_file(source, self._folder / name)
        self._enter(name, *entry)

    def add_tensors(
        self,
        name: str,
        specs: Sequence[Spec],
        tensors: Iterable[tuple[str, HostTensor]],
        metadata: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """Stream a safetensors file; returns the digest of each tensor."""
        self._take(name)
        path = self._folder / name
        digests = write_tensors(path, specs, tensors, metadata)
        header = build_header(specs, metadata)
        digest = file_digest(header, (digests[spec[0]] for spec in specs))
        self._enter(name, path.stat().st_size, f"tensors:{digest}")
        return digests

    def finish(self, **facts: int | str) -> None:
        """Write `manifest.json` with `facts` beside the files; nothing may be added after it."""
        manifest = {"format_version": FORMAT_VERSION, **facts, "files": self._files}
        content = encode_json(manifest)
        with durable.create_file(self._folder / MANIFEST, expected_bytes=len(content)) as file:
            file.write(content)

    def _take(self, name: str) -> None:
        assert is_flat_name(name), name
        assert name not in {MANIFEST, *self._files}, name

    def _enter(self, name: str, size: int, digest: str) -> None:
        self._files[name] = {"bytes": size, "digest": digest}


class Manifest(NamedTuple):
    """A manifest as read: its facts (`step`, say) and its files."""

    folder: Path
    facts: Mapping[str, Any]
    files: Mapping[str, Entry]

    def read(self, name: str) -> bytes:
        """The content of a plain file, proven. Raises IntegrityError."""
        path, entry = self.folder / name, self.entry(name)
        content = read_bytes(path, follow_links=False)
        if len(content) != entry.size_bytes:
            raise refused(
                path, "size", f"{len(content)} bytes, the manifest says {entry.size_bytes}"
            )
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != entry.digest:
            raise refused(path, "content", "is not what the manifest promised (digest differs)")
        return content

    def check_tensors(self, file: TensorFile, certified: Mapping[str, str]) -> None:
        """Prove the header of a tensor file, and that the manifest agrees with the certified
        digests; the tensors themselves are proven against those. Raises IntegrityError."""
        entry = self.entry(file.path.name)
        if file.size_bytes != entry.size_bytes:
            reason = f"{file.size_bytes} bytes, the manifest says {entry.size_bytes}"
            raise refused(file.path, "size", reason)
        unknown = [name for name in file.names() if name not in certified]
        if unknown:
            raise refused(file.path, f"tensor {unknown[0]!r}", "is not in the certificate")
        if f"tensors:{file.file_digest(certified)}" != entry.digest:
            raise refused(file.path, "header", "is not what manifest and certificate promised")

    def entry(self, name: str) -> Entry:
        """The entry of a file. Raises IntegrityError."""
        entry = self.files.get(name)
        if entry is None:
            raise refused(self.folder / MANIFEST, "files", f"{name} is missing")
        return entry


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest; the files it names are not touched yet.

    Raises:
        IntegrityError: missing, not in its one spelling, of a newer format, a name that leads out.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise refused(folder, MANIFEST, "is missing: the directory was never finished")
    content = read_bytes(path, max_bytes=_MAX_BYTES, follow_links=False)
    table = parse_json(content, path)
    if not isinstance(table, dict) or encode_json(table) != content:
        raise refused(path, "the JSON text", "is not spelt as it was written")
    refuse_newer(table, path)
    files = table.pop("files", None)
    if not isinstance(files, dict):
        raise refused(path, "files", "is no table")
    entries = {name: _read_entry(name, entry, path) for name, entry in files.items()}
    return Manifest(folder, table, entries)


def refuse_newer(table: Mapping[str, Any], path: Path) -> None:
    """Raise IntegrityError unless the table is of this format version."""
    version = table.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        fix = "open it with the version of SoloLLM that wrote it, or a newer one"
        raise refused(path, "format_version", f"{version!r}, not {FORMAT_VERSION}", fix=fix)


def _read_entry(name: str, entry: Any, path: Path) -> Entry:
    place = f"files[{name[:80]!r}]"
    if not is_flat_name(name):
        raise refused(path, place, "is no plain file name")
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "digest"}:
        raise refused(path, place, "is not exactly bytes and digest")
    size, digest = entry["bytes"], entry["digest"]
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        raise refused(path, place, "has no size or digest")
    if not _DIGEST.fullmatch(digest):
        raise refused(path, place, "has a malformed digest")
    return Entry(size, digest)
