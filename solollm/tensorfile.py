"""Safetensors files: read through a validated header and a held descriptor, written as a stream.

Never mmap: a mapped file that is cut while in use ends the process by SIGBUS. Digests are sha256
(1.8 GB/s here with SHA instructions, blake2b 0.7): one per tensor, of its raw bytes, and one per
file, the sha256 of header and tensor digests in file order, so that a single pass over the data
proves both. Which files make a checkpoint is `solollm.checkpoint`'s.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from solollm import durable
from solollm.backend import BITS_DTYPE, DType, HostTensor
from solollm.errors import BackendError
from solollm.strictfile import open_regular, parse_json, read_at, read_bytes, refused
from solollm.tensorheader import (
    Header,
    Spec,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
    spec_bytes,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FOR_TRANSFORMERS = {"format": "pt"}  # metadata of weights: it refuses a file without this line
FLOATS = ("F32", "F16", "BF16")
_HASH_BYTES = 1 << 24
_THREADED_BYTES = 1 << 25
_MAX_SHARDS = 512


class TensorFile:
    """One safetensors file as a `TensorSource`; the descriptor is held until `close`.

    Raises:
        IntegrityError: the file, its header or a read is refused; names path, place and reason.
    """

    def __init__(self, path: Path, *, follow_links: bool = True) -> None:
        self.path = path
        fd, self.size_bytes = open_regular(path, follow_links=follow_links)
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        try:
            self._header = self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> Header:
        prefix = bytearray(min(8, self.size_bytes))
        read_at(self._fd, memoryview(prefix), 0, self.path)
        length = header_length(prefix, self.size_bytes, self.path)
        raw = bytearray(8 + length)
        read_at(self._fd, memoryview(raw), 0, self.path)
        return parse_header(raw, self.size_bytes, self.path)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The `__metadata__` table."""
        return self._header.metadata

    def names(self) -> Sequence[str]:
        """Tensor names in file order."""
        return list(self._header.tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        info = self._header.tensors.get(name)
        if info is None:
            raise refused(self.path, f"tensor {name!r}", "is missing")
        return info

    def read(self, name: str) -> HostTensor:
        """The tensor, in memory of its own."""
        info = self.info(name)
        if info.dtype not in BITS_DTYPE:
            place = f"tensor {name!r}"
            raise refused(self.path, place, f"{info.dtype} cannot be loaded here")
        try:
            data = np.empty(info.shape, BITS_DTYPE[info.dtype])
        except MemoryError:
            needed = f"needs {info.end - info.begin:,} bytes of memory"
            raise refused(self.path, f"tensor {name!r}", needed) from None
        read_at(self._fd, _as_bytes(data), info.begin, self.path)
        return HostTensor(cast(DType, info.dtype), info.shape, data)

    def row(self, name: str, index: int) -> np.ndarray:
        """Row `index` of a matrix of floats, as float32, without reading the rest."""
        info = self.info(name)
        if info.dtype not in FLOATS or len(info.shape) != 2 or not 0 <= index < info.shape[0]:
            raise refused(self.path, f"tensor {name!r}", f"has no row {index} of numbers")
        data = np.empty(info.shape[1], BITS_DTYPE[info.dtype])
        read_at(self._fd, _as_bytes(data), info.begin + index * data.nbytes, self.path)
        return HostTensor(cast(DType, info.dtype), data.shape, data).float32()

    def digest(self, name: str) -> str:
        """sha256 of the tensor's raw bytes, read in pieces."""
        info = self.info(name)
        state = hashlib.sha256()
        buffer = memoryview(bytearray(min(_HASH_BYTES, info.end - info.begin)))
        for place in range(info.begin, info.end, _HASH_BYTES):
            piece = buffer[: min(_HASH_BYTES, info.end - place)]
            read_at(self._fd, piece, place, self.path)
            state.update(piece)
        return state.hexdigest()

    def digests(self) -> dict[str, str]:
        """`digest` of every tensor; a large file on up to four threads."""
        names = self.names()
        if self.size_bytes < _THREADED_BYTES:
            return {name: self.digest(name) for name in names}
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return dict(zip(names, pool.map(self.digest, names), strict=True))

    def file_digest(self, digests: Mapping[str, str]) -> str:
        """The digest of the file, from those of its tensors."""
        return file_digest(self._header.raw, [digests[name] for name in self.names()])

    def close(self) -> None:
        self._close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Weights:
    """The weights of a model folder, in one file or many, as one `TensorSource`.

    `read` refuses what is no weight: another dtype than F32, F16 or BF16, NaN, infinity.
    """

    def __init__(self, folder: Path, files: Sequence[TensorFile]) -> None:
        self.folder = folder
        self.files = files
        self._home: dict[str, TensorFile] = {}
        for file in files:
            for name in file.names():
                if name in self._home:
                    first = self._home[name].path.name
                    raise refused(file.path, f"tensor {name!r}", f"stands in {first} as well")
                self._home[name] = file

    def names(self) -> Sequence[str]:
        return list(self._home)

    def info(self, name: str) -> TensorInfo:
        return self._file(name).info(name)

    def read(self, name: str) -> HostTensor:
        file = self._file(name)
        dtype = file.info(name).dtype
        if dtype not in FLOATS:
            raise refused(file.path, f"tensor {name!r}", f"{dtype} is no dtype of weights")
        tensor = file.read(name)
        if not is_finite(tensor):
            raise refused(file.path, f"tensor {name!r}", "holds NaN or infinity")
        return tensor

    def row(self, name: str, index: int) -> np.ndarray:
        """Row `index` of a matrix, as float32, without reading the rest."""
        return self._file(name).row(name, index)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def _file(self, name: str) -> TensorFile:
        file = self._home.get(name)
        if file is None:
            raise refused(self.folder, f"tensor {name!r}", "is missing")
        return file


def open_weights(folder: Path, *, locate: Callable[[str], Path] | None = None) -> Weights:
    """The weights of a folder in Hugging Face layout: `model.safetensors`, or shards by index.

    No name in the index leads outside the folder, and no link is followed. `locate` says where a
    file name of this folder really lies (a download cache links to it); default: in the folder.

    Raises:
        IntegrityError: no weights, a refused file, an index that disagrees with its shards.
    """
    at = locate or folder.joinpath
    single, index = folder / WEIGHTS, folder / INDEX
    if not index.exists() or single.exists():
        return Weights(folder, [TensorFile(at(WEIGHTS), follow_links=False)])
    weight_map = _read_index(at(INDEX))
    shards = sorted(set(weight_map.values()))
    weights = Weights(folder, [TensorFile(at(shard), follow_links=False) for shard in shards])
    for shard, file in zip(shards, weights.files, strict=True):
        for name in file.names():
            if weight_map.get(name) != shard:
                raise refused(index, f"tensor {name!r}", f"is in {shard}, not as mapped")
    for name, shard in weight_map.items():
        if name not in weights.names():
            raise refused(index, f"tensor {name!r}", f"is not in {shard}")
    return weights


def _read_index(index: Path) -> dict[str, str]:
    content = read_bytes(index, follow_links=False)
    table = parse_json(content, index)
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise refused(index, "weight_map", "is no table of names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_flat_name(shard):
            raise refused(
                index, f"weight_map[{name[:80]!r}]", f"{str(shard)[:80]!r} is no file name"
            )
    if len(set(weight_map.values())) > _MAX_SHARDS:
        raise refused(index, "weight_map", f"more than {_MAX_SHARDS} shards")
    return weight_map


def split_shards(specs: Sequence[Spec], shard_bytes: int) -> dict[str, list[Spec]]:
    """File name -> the tensors it holds, in order: one file, or shards of at most `shard_bytes`
    (one tensor at least), named as Hugging Face does."""
    shards: list[list[Spec]] = [[]]
    room = shard_bytes
    for spec in specs:
        size = spec_bytes(spec[1], spec[2])
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    count = len(shards)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def shard_index(shards: Mapping[str, Sequence[Spec]]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json` for several shards."""
    weight_map = {spec[0]: file for file, specs in shards.items() for spec in specs}
    total = sum(spec_bytes(dtype, shape) for specs in shards.values() for _, dtype, shape in specs)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def is_flat_name(name: str) -> bool:
    """Whether `name` is a plain file name that stays in its folder, on every system."""
    flat = name not in ("", ".", "..") and not set(name) & set("/\\:")
    return flat and name.isprintable() and name.isascii() and len(name) <= 255


def write_tensors(
    path: Path,
    specs: Sequence[Spec],
    tensors: Iterable[tuple[str, HostTensor]],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Stream `tensors` into a new file and return the sha256 of each; one tensor is live.

    `specs` (name, dtype, shape) promise what comes, in order. Not flushed: write inside a
    `durable.staged_directory`.

    Raises:
        StorageError: the disk is full or failing.
        BackendError: what came is not what was promised.
    """
    digests: dict[str, str] = {}
    header = build_header(specs, metadata)
    total = len(header) + sum(spec_bytes(dtype, shape) for _, dtype, shape in specs)
    stream = iter(tensors)
    with (
        ThreadPoolExecutor(1) as hasher,  # hashlib releases the GIL: hash while the disk writes
        durable.create_file(path, expected_bytes=total) as file,
    ):
        file.write(header)
        for spec in specs:
            name, tensor = next(stream, ("", None))
            if tensor is None or (name, tensor.dtype, tuple(tensor.shape)) != tuple(spec):
                raise BackendError(f"{path.name}: {spec} was promised, {name!r} came")
            data = _as_bytes(np.ascontiguousarray(tensor.data))
            digest = hasher.submit(hashlib.sha256, data)
            file.write(data)
            digests[name] = digest.result().hexdigest()
        if next(stream, None) is not None:
            raise BackendError(f"{path.name}: more than was promised came after the last tensor")
    return digests


def file_digest(header: bytes | bytearray, digests: Iterable[str]) -> str:
    """sha256 of the header bytes and the binary tensor digests in file order."""
    state = hashlib.sha256(header)
    for digest in digests:
        state.update(bytes.fromhex(digest))
    return state.hexdigest()


def tensor_digest(tensor: HostTensor) -> str:
    """sha256 of a tensor's raw bytes."""
    return hashlib.sha256(_as_bytes(np.ascontiguousarray(tensor.data))).hexdigest()


def is_finite(tensor: HostTensor) -> bool:
    """Whether a tensor holds no NaN and no infinity (integers never do)."""
    data = tensor.data
    if tensor.dtype not in FLOATS or not data.size:
        return True
    if tensor.dtype == "BF16":
        return bool(((data & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(data.max()) and np.isfinite(data.min()))  # both carry NaN through


def _as_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8).data)
