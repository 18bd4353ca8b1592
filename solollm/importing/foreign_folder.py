"""The files of a folder that somebody else made: which may be opened, and where they really lie.

The cache of `huggingface_hub` keeps files in `blobs/` and shows them as links in
`snapshots/<commit>/`. Those links are resolved here, one step and into those blobs only; any other
is refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from solollm.errors import ConfigError
from solollm.strictfile import parse_json, read_bytes, refused
from solollm.tensorfile import INDEX, WEIGHTS, Weights, is_flat_name, open_weights

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class ForeignFolder:
    """A model folder. `name` and `revision` say where it came from as far as its path tells."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._blobs: Path | None = None
        self.name, self.revision = self.path.name, ""
        if self.path.parent.name == "snapshots":
            cache = self.path.parent.parent
            self._blobs, self.revision = cache / "blobs", self.path.name
            self.name = cache.name.removeprefix("models--").replace("--", "/")

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def locate(self, name: str) -> Path:
        """Where the file `name` lies. Raises IntegrityError for a link that leads elsewhere."""
        path = self.path / name
        if not path.is_symlink():
            return path
        target = Path(os.path.normpath(path.parent / path.readlink()))
        if target.parent != self._blobs or not is_flat_name(target.name):
            fix = "put the file itself into the folder"
            raise refused(path, "the file", "is a link that leads out of its download", fix=fix)
        return target

    def read(self, name: str) -> bytes:
        """The content of a small file. Raises IntegrityError."""
        return read_bytes(self.locate(name), follow_links=False)

    def read_table(self, name: str) -> dict[str, Any]:
        """A JSON object; {} where there is no such file. Raises IntegrityError."""
        if not self.has(name):
            return {}
        path = self.path / name
        table = parse_json(self.read(name), path)
        if not isinstance(table, dict):
            raise refused(path, "the JSON text", "is no table")
        return table

    def open_weights(self) -> Weights:
        """Its safetensors. Raises ConfigError where there are none, IntegrityError for damage."""
        if not self.has(WEIGHTS) and not self.has(INDEX):
            raise ConfigError(
                f"{self.path} holds no {WEIGHTS} and no {INDEX}",
                why=self._why_not(),
                fix="use a copy of the model in safetensors; most publishers have one",
            )
        return open_weights(self.path, locate=self.locate)

    def _why_not(self) -> str:
        names = sorted(entry.name for entry in self.path.iterdir())
        for name in names:
            if name.endswith(_PICKLES):
                return f"{name} is no safetensors file but a pickle, which can run code when read"
        return f"it holds {', '.join(names[:8]) or 'nothing'}"
