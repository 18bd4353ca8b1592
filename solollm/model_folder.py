"""A plain Hugging Face model folder: writing it whole, and reading the files beside its weights.

Exports and imports are such folders; a checkpoint, which carries proofs besides, is written by
`solollm.checkpoint`. The weights themselves are read by `solollm.tensorfile.open_weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from solollm import durable
from solollm.architecture import ModelConfig
from solollm.backend import HostTensor
from solollm.data.placement import swept
from solollm.errors import ConfigError
from solollm.strictfile import encode_json, read_table, refused
from solollm.tensorfile import (
    FOR_TRANSFORMERS,
    INDEX,
    open_weights,
    shard_index,
    split_shards,
    write_tensors,
)
from solollm.tensorheader import Spec, spec_bytes

SHARD_BYTES = 4_000_000_000
CONFIG, GENERATION, ORIGIN = "config.json", "generation_config.json", "origin.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_HEADROOM = 1.1
_BESIDE_WEIGHTS = (
    CONFIG, GENERATION, ORIGIN, "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def write_model_folder(
    out: Path,
    files: Mapping[str, bytes],
    specs: Sequence[Spec],
    tensors: Iterable[tuple[str, HostTensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the folder `out`, whole or not at all, one tensor live; returns its size in bytes.

    `specs` promise the tensors that come, in order.

    Raises:
        ConfigError: `out` is taken.
        StorageError: no room, or the disk fails; nothing is left at `out`.
    """
    shards = split_shards(specs, shard_bytes)
    index = {INDEX: encode_json(shard_index(shards))} if len(shards) > 1 else {}
    return write_folder(out, {**files, **index}, shards, tensors)


def write_folder(
    out: Path,
    files: Mapping[str, bytes],
    weights: Mapping[str, Sequence[Spec]],
    tensors: Iterable[tuple[str, HostTensor]],
) -> int:
    """The same with weight files of the caller's own: file name -> the tensors it holds, in order.
    Raises as `write_model_folder`."""
    specs = [spec for of_file in weights.values() for spec in of_file]
    expected = sum(spec_bytes(dtype, shape) for _, dtype, shape in specs)
    with new_folder(out, files, expected_bytes=expected) as folder:
        stream = iter(tensors)
        for name, of_file in weights.items():
            part = islice(stream, len(of_file))
            write_tensors(folder / name, of_file, part, FOR_TRANSFORMERS)
        return folder_bytes(folder)


@contextmanager
def new_folder(out: Path, files: Mapping[str, bytes], *, expected_bytes: int) -> Iterator[Path]:
    """A folder that holds `files` and is filled with weights of `expected_bytes`; it stands at
    `out` afterwards, whole or not at all. Raises as `write_model_folder`."""
    require_free(out)
    durable.make_directory(out.parent)
    durable.require_space(out.parent, int(_HEADROOM * expected_bytes))
    with swept(out), durable.staged_directory(out) as folder:
        for name, content in files.items():
            _write(folder / name, content)
        yield folder


def folder_bytes(folder: Path) -> int:
    """The size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def require_free(out: Path) -> None:
    """Raise ConfigError unless nothing, or an empty folder, stands at `out`."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out} exists already",
            why="a model folder is never written over something else",
            fix="choose another --out, or move that away",
        )


class Origin(NamedTuple):
    """Where an imported model came from: its hub id or its folder's name, the hub's revision, and
    what its weights were stored as there."""

    name: str
    revision: str
    weights: str


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that a model needs: no optimizer's, no logs, no proofs."""
    names = [*_BESIDE_WEIGHTS, INDEX]
    weights = open_weights(folder)
    weights.close()
    present = [folder / name for name in names if (folder / name).is_file()]
    return sorted({*present, *(file.path for file in weights.files)})


def read_origin(folder: Path) -> Origin | None:
    """The origin of an imported model; None for any other. Raises IntegrityError."""
    path = folder / ORIGIN
    if not path.is_file():
        return None
    table = read_table(path)
    fields = [table.get(name) for name in Origin._fields]
    if not all(isinstance(field, str) and field.isprintable() for field in fields):
        raise refused(path, "the JSON text", f"is not {', '.join(Origin._fields)}")
    return Origin(*map(str, fields))


def read_model(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """The model that a `config.json` describes. Raises ConfigError where it is not computed here,
    IntegrityError where it makes no sense."""
    try:
        return ModelConfig.from_hf(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refused(path, "the model", f"{type(error).__name__}: {error}") from error


def token_ids(raw: Mapping[str, Any]) -> dict[str, int]:
    """The special token ids that a `config.json` names, where each is a single id."""
    return {key: raw[key] for key in TOKEN_IDS if type(raw.get(key)) is int}


def _write(path: Path, content: bytes) -> None:
    with durable.create_file(path, expected_bytes=len(content)) as file:
        file.write(content)
