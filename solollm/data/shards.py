"""The corpus on disk: token shards, document starts, and the index that vouches for them.

    <corpus>/index.json                    counts, digests, tokenizer, fingerprint; written last
    <corpus>/<split>/tokens-00000.bin ...  raw little-endian uint16 (uint32 above 65,536 ids)
    <corpus>/<split>/documents.bin         little-endian uint64: each document's first token in the
                                           split, then the number of tokens

A split is the concatenation of its documents, each stored as bos + tokens + eos. File names follow
from the position of a shard, so that an index can never point outside its folder. What order the
tokens are read in is `solollm.data.stream`'s concern; where they come from, `solollm.data.build`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from solollm.durable import DurableFile, create_file
from solollm.errors import ConfigError, IntegrityError, quoted

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)
INDEX_NAME = "index.json"
DOCUMENTS_NAME = "documents.bin"
TOKENIZER_FOLDER = "tokenizer"
SHARD_TOKENS = 2**29  # 1 GB: a reader keeps every shard open, and macOS allows 256 files
_OFFSET_DTYPE = np.dtype("<u8")
_OFFSETS_PER_WRITE = 8192
_WRITE_BYTES = 2**20
_OFFSETS_PER_BLOCK = 512  # one page


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardRecord(_Record):
    """One `tokens-*.bin`."""

    tokens: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SplitRecord(_Record):
    """One split. `text_bytes` counts the UTF-8 bytes of its documents' text."""

    documents: int = Field(ge=0, le=2**60)
    tokens: int = Field(ge=0, le=2**60)
    text_bytes: int = Field(ge=0, le=2**60)
    documents_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    shards: tuple[ShardRecord, ...]


class CorpusIndex(_Record):
    """`index.json`. `fingerprint` is `index_fingerprint(index)`: it covers every other field, and
    through the digests every byte of the tokens."""

    format: Literal["solollm-corpus"] = "solollm-corpus"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=2, le=2**32)
    bos_id: int = Field(ge=0)
    eos_id: int = Field(ge=0)
    tokenizer_digest: str
    splits: Mapping[Split, SplitRecord]
    fingerprint: str = ""


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest stored type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def shard_path(corpus: Path, split: Split, number: int) -> Path:
    return corpus / split / f"tokens-{number:05d}.bin"


def index_fingerprint(index: CorpusIndex) -> str:
    """32 hex digits over every field but the fingerprint itself."""
    content = index.model_dump(mode="json", exclude={"fingerprint"})
    encoded = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def sealed(index: CorpusIndex) -> CorpusIndex:
    """The index with its fingerprint filled in."""
    return index.model_copy(update={"fingerprint": index_fingerprint(index)})


def encode_index(index: CorpusIndex) -> bytes:
    """The bytes of `index.json`."""
    return (json.dumps(index.model_dump(mode="json"), indent=1) + "\n").encode()


def read_index(corpus: Path) -> CorpusIndex:
    """Read and check `index.json`.

    Raises:
        ConfigError: the folder holds no corpus.
        IntegrityError: the index is damaged or was changed by hand.
    """
    path = corpus / INDEX_NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{corpus} is not a built corpus",
            why=f"{INDEX_NAME} cannot be read: {error.strerror}",
            fix=f"build one with `solollm data build SOURCES --out {quoted(corpus)}`",
        ) from error
    try:
        index = CorpusIndex.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"{place}: {first['msg']}".lstrip(": ")) from error
    if index.fingerprint != index_fingerprint(index):
        raise _damaged(
            path,
            f"it says fingerprint {index.fingerprint or '(none)'} but its fields give"
            f" {index_fingerprint(index)}",
        )
    return index


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"{path} is damaged", why=why, fix="build the corpus again")


class SplitWriter:
    """Writes one split, document by document; a context manager. Runs inside a staged directory,
    which flushes the files and gives them their final name.

    Raises:
        StorageError: the disk is full or failing.
    """

    def __init__(
        self, corpus: Path, split: Split, *, vocab_size: int, bos_id: int, eos_id: int,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:  # fmt: skip
        self._corpus, self._split, self._shard_tokens = corpus, split, shard_tokens
        self._vocab_size, self._bos_id, self._eos_id = vocab_size, bos_id, eos_id
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._starts: list[int] = []
        self._shards: list[ShardRecord] = []
        self._shard_length = 0
        self._stack = ExitStack()
        self.num_documents = self.num_tokens = self.text_bytes = 0

    def __enter__(self) -> SplitWriter:
        (self._corpus / self._split).mkdir()
        self._documents = _HashedFile(self._corpus / self._split / DOCUMENTS_NAME, self._stack)
        self._shard: _HashedFile | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, token_ids: np.ndarray, text_bytes: int) -> None:
        """Append one document of `text_bytes` bytes of text; `token_ids` [n] without specials."""
        if token_ids.size and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < (
            self._vocab_size
        ):
            raise ValueError(f"token id outside 0..{self._vocab_size - 1}")
        stored = np.empty(token_ids.size + 2, self._dtype)
        stored[0], stored[1:-1], stored[-1] = self._bos_id, token_ids, self._eos_id
        self._starts.append(self.num_tokens)
        if len(self._starts) == _OFFSETS_PER_WRITE:
            self._flush_starts()
        self.num_documents += 1
        self.num_tokens += stored.size
        self.text_bytes += text_bytes
        while stored.size:
            stored = self._fill_shard(stored)

    def finish(self) -> SplitRecord:
        """Write what is pending; what the index says of the split."""
        self._starts.append(self.num_tokens)
        self._flush_starts()
        self._close_shard()
        return SplitRecord(
            documents=self.num_documents, tokens=self.num_tokens, text_bytes=self.text_bytes,
            documents_sha256=self._documents.close(), shards=tuple(self._shards),
        )  # fmt: skip

    def _flush_starts(self) -> None:
        self._documents.write(np.array(self._starts, _OFFSET_DTYPE).tobytes())
        self._starts.clear()

    def _fill_shard(self, tokens: np.ndarray) -> np.ndarray:
        """Write what fits into the open shard; the tokens left over."""
        if self._shard is None:
            path = shard_path(self._corpus, self._split, len(self._shards))
            self._shard, self._shard_length = _HashedFile(path, self._stack), 0
        room = self._shard_tokens - self._shard_length
        self._shard.write(tokens[:room].tobytes())
        self._shard_length += min(room, tokens.size)
        if self._shard_length == self._shard_tokens:
            self._close_shard()
        return tokens[room:]

    def _close_shard(self) -> None:
        if self._shard is not None:
            digest = self._shard.close()
            self._shards.append(ShardRecord(tokens=self._shard_length, sha256=digest))
            self._shard = None


class _HashedFile:
    """A new file written in large blocks; `stack` closes it if `close` is never reached."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._stack = stack.enter_context(ExitStack())
        self._file: DurableFile = self._stack.enter_context(create_file(path))
        self._hash = hashlib.sha256()
        self._pending = bytearray()

    def write(self, data: bytes) -> None:
        self._pending += data
        if len(self._pending) >= _WRITE_BYTES:
            self._flush()

    def close(self) -> str:
        """The SHA-256 of all that was written."""
        self._flush()
        self._stack.close()
        return self._hash.hexdigest()

    def _flush(self) -> None:
        self._file.write(self._pending)
        self._hash.update(self._pending)
        self._pending.clear()


class SplitReader:
    """A split through positioned reads: opening it reads nothing but the index, and a read costs
    what it returns. Not memory maps: a mapped file that is truncated kills the process (SIGBUS),
    and cold page faults were seen to cost 1.5 s for a batch of 64 rows. Safe for threads.

    Raises:
        ConfigError: no corpus there.
        IntegrityError: a file is missing or its size is not the index's. Contents are proven by
            `verify_corpus`, not here.
    """

    def __init__(self, corpus: Path, split: Split) -> None:
        self.index = read_index(corpus)
        if split not in self.index.splits:
            raise ConfigError(f"corpus {corpus} has no split {split!r}")
        self.record = self.index.splits[split]
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        self._shards = [
            _Array(shard_path(corpus, split, number), dtype, shard.tokens)
            for number, shard in enumerate(self.record.shards)
        ]
        self._ends = list(accumulate(shard.tokens for shard in self.record.shards))
        starts = _Array(corpus / split / DOCUMENTS_NAME, _OFFSET_DTYPE, self.record.documents + 1)
        self._starts = starts
        held = self._ends[-1] if self._ends else 0
        last = int(starts.read(self.record.documents, 1)[0])
        if not held == self.record.tokens == last:
            raise _damaged(
                corpus / INDEX_NAME,
                f"{split} has {self.record.tokens} tokens, its shards {held}, its document"
                f" starts end at {last}",
            )
        blocks = range(0, self.record.documents, _OFFSETS_PER_BLOCK)
        self._blocks = blocks
        # The upper levels of every search are the same few places: they are read once.
        self._block_start = lru_cache(4096)(lambda number: int(starts.read(number, 1)[0]))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int32 copy of tokens start..stop-1 of the split; shorter where the split ends."""
        stop = min(stop, self.record.tokens)
        out = np.empty(max(0, stop - start), np.int32)
        filled = 0
        number = bisect_right(self._ends, start)
        while filled < out.size:
            shard = self._shards[number]
            offset = start + filled - (self._ends[number] - shard.length)
            piece = shard.read(offset, min(out.size - filled, shard.length - offset))
            out[filled : filled + piece.size] = piece
            filled += piece.size
            number += 1
        return out

    def starts_between(self, first: int, last: int) -> np.ndarray:
        """int64 positions p, first <= p < last, at which a document starts."""
        block = max(0, bisect_right(self._blocks, first, key=self._block_start) - 1)
        found = []
        for number in self._blocks[block:]:
            count = min(_OFFSETS_PER_BLOCK, self.record.documents - number)
            starts = self._starts.read(number, count).astype(np.int64)
            found.append(starts[(starts >= first) & (starts < last)])
            if starts[-1] >= last:
                break
        return np.concatenate([np.empty(0, np.int64), *found])

    def document(self, number: int) -> np.ndarray:
        """int32 ids of document `number`, with its bos and eos."""
        if not 0 <= number < self.record.documents:
            raise ConfigError(
                f"no document {number}", why=f"the split has {self.record.documents} documents"
            )
        start, stop = self._starts.read(number, 2)
        return self.tokens(int(start), int(stop))


class _Array:
    """A file of `length` items of one dtype, open for as long as this object lives."""

    def __init__(self, path: Path, dtype: np.dtype, length: int) -> None:
        self.length = length
        self._path, self._dtype = path, dtype
        expected = length * dtype.itemsize
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _damaged(path, f"it cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)
        size = os.fstat(self._descriptor).st_size
        if size != expected:
            raise _damaged(path, f"it holds {size} bytes, the index says {expected}")

    def read(self, start: int, count: int) -> np.ndarray:
        """Items start..start+count-1, all of which must exist."""
        wanted, offset = count * self._dtype.itemsize, start * self._dtype.itemsize
        pieces: list[bytes] = []
        while wanted:
            piece = os.pread(self._descriptor, wanted, offset)
            if not piece:
                raise _damaged(self._path, "it was cut short while it was being read")
            pieces.append(piece)
            wanted, offset = wanted - len(piece), offset + len(piece)
        return np.frombuffer(b"".join(pieces), self._dtype)


def corpus_files(corpus: Path, index: CorpusIndex) -> dict[Path, str]:
    """Every file of tokens and document starts, and its SHA-256."""
    files = {}
    for split, record in index.splits.items():
        for number, shard in enumerate(record.shards):
            files[shard_path(corpus, split, number)] = shard.sha256
        files[corpus / split / DOCUMENTS_NAME] = record.documents_sha256
    return files


def verify_corpus(corpus: Path) -> CorpusIndex:
    """Read every byte and compare it with the index.

    Raises:
        IntegrityError: names the first file that differs.
    """
    index = read_index(corpus)
    for split in index.splits:
        SplitReader(corpus, split)
    for path, digest in corpus_files(corpus, index).items():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise _damaged(path, f"its SHA-256 is {found}, the index says {digest}")
    return index
