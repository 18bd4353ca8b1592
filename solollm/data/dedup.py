"""Exact duplicates out, and the rest in an order that depends on content alone.

Texts are spooled to 64 files by the first bits of their digest. Read back bucket by bucket and
sorted by digest, equal texts lie side by side, and the order is that of a hash: unrelated to file
names and paths, the same however the inputs were listed, with neighbours that have nothing to do
with each other. Memory holds 33 bytes per document of one bucket, and no text but one.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solollm.durable import DurableFile, create_file

DIGEST_BYTES = 16
_BUCKETS = 64
_WRITE_BYTES = 2**18
_RECENT = 2**20  # digests remembered while spooling; it only saves disk
_HEADER = struct.Struct("<16sIBQ")  # digest, source number, is validation, bytes of text
_ENTRY = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("source", "<u4"), ("validation", "u1"), ("offset", "<u8"),
     ("length", "<u8")]
)  # fmt: skip


class Spooled(NamedTuple):
    """One distinct text, UTF-8, with the number of the first source that held it."""

    digest: bytes
    text: bytes
    source: int
    is_validation: bool


class Survey(NamedTuple):
    """What a spool holds. `longest` is the digest of the longest text (the lowest, of equals)."""

    documents: int
    duplicates: int
    text_bytes: int
    train_bytes: int
    validation_documents: int
    longest: bytes


def text_digest(text: bytes) -> bytes:
    """16 bytes that stand for a normalised text."""
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


class Spool:
    """Takes texts in any order, gives the distinct ones back by digest, as often as asked.

    A context manager around the writing; `folder` must exist and be empty.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"spool-{number:02d}.bin" for number in range(_BUCKETS)]
        self._buffers = [bytearray() for _ in self._paths]
        self._files: list[DurableFile] = []
        self._stack = ExitStack()
        self._recent: set[bytes] = set()
        self._dropped = 0
        self._stays: np.ndarray | None = None  # bool [distinct texts]; None: all

    def __enter__(self) -> Spool:
        self._files = [self._stack.enter_context(create_file(path)) for path in self._paths]
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            for number in range(_BUCKETS):
                self._flush(number)
        self._recent.clear()

    def add(self, text: bytes, digest: bytes, *, source: int, is_validation: bool) -> None:
        """Keep a text, unless it is a duplicate of one seen lately."""
        if digest in self._recent:
            self._dropped += 1
            return
        if len(self._recent) < _RECENT:
            self._recent.add(digest)
        number = digest[0] * _BUCKETS // 256
        buffer = self._buffers[number]
        buffer += _HEADER.pack(digest, source, is_validation, len(text))
        buffer += text
        if len(buffer) >= _WRITE_BYTES:
            self._flush(number)

    def survey(self) -> Survey:
        """Counts, from the headers alone."""
        documents = text_bytes = train_bytes = validation_documents = 0
        duplicates, longest = self._dropped, (0, b"")
        for _, entries, repeats in self._buckets():
            documents += entries.size
            duplicates += repeats
            text_bytes += int(entries["length"].sum())
            train_bytes += int(entries["length"][entries["validation"] == 0].sum())
            validation_documents += int(entries["validation"].sum())
            if entries.size and int(entries["length"].max()) > longest[0]:
                entry = entries[int(entries["length"].argmax())]
                longest = (int(entry["length"]), _digest(entry))
        return Survey(
            documents, duplicates, text_bytes, train_bytes, validation_documents, longest[1]
        )

    def documents(self) -> Iterator[Spooled]:
        """Distinct texts in the order of their digests. Of equal texts the first source counts."""
        for descriptor, entries, _ in self._buckets():
            yield from (_read(descriptor, entry) for entry in entries)

    @contextmanager
    def texts(self) -> Iterator[SpooledTexts]:
        """All distinct texts by their number in that order, read from the disk as they are asked
        for. Memory holds 33 bytes for each, until the end of the context."""
        with ExitStack() as stack:
            descriptors, tables = [], []
            for path in self._paths:
                descriptors.append(os.open(path, os.O_RDONLY))
                stack.callback(os.close, descriptors[-1])
                tables.append(_distinct(np.fromiter(_headers(descriptors[-1]), _ENTRY))[0])
            yield SpooledTexts(descriptors, tables, self._stays)

    def leave_out(self, numbers: Iterable[int]) -> None:
        """Give these of `texts` no more."""
        if self._stays is None:
            with self.texts() as texts:
                self._stays = np.ones(len(texts), bool)
        self._stays[np.fromiter(numbers, np.int64)] = False

    def _buckets(self) -> Iterator[tuple[int, np.ndarray, int]]:
        """(open file, its distinct entries in order, the number of duplicates) per bucket."""
        first = 0
        for path in self._paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                entries, repeats = _distinct(np.fromiter(_headers(descriptor), _ENTRY))
                stays = slice(None) if self._stays is None else self._stays[first:][: entries.size]
                first += entries.size
                yield descriptor, entries[stays], repeats
            finally:
                os.close(descriptor)

    def _flush(self, number: int) -> None:
        self._files[number].write(self._buffers[number])
        self._buffers[number].clear()


class SpooledTexts:
    """What `Spool.texts` gives; `left`: the numbers of those that were not left out so far."""

    def __init__(
        self, descriptors: list[int], tables: list[np.ndarray], stays: np.ndarray | None
    ) -> None:
        self._descriptors, self._entries = descriptors, np.concatenate(tables)
        self._stops = np.cumsum([table.size for table in tables])
        self.left = np.arange(len(self)) if stays is None else np.nonzero(stays)[0]

    @property
    def sizes(self) -> np.ndarray:
        """int64 [texts]: bytes of each."""
        return self._entries["length"].astype(np.int64)

    @property
    def text_bytes(self) -> int:
        return int(self.sizes.sum())

    def __len__(self) -> int:
        return self._entries.size

    def __getitem__(self, number: int) -> Spooled:
        bucket = int(np.searchsorted(self._stops, number, side="right"))
        return _read(self._descriptors[bucket], self._entries[number])


def _read(descriptor: int, entry: np.void) -> Spooled:
    text = os.pread(descriptor, int(entry["length"]), int(entry["offset"]))
    return Spooled(_digest(entry), text, int(entry["source"]), bool(entry["validation"]))


def _distinct(entries: np.ndarray) -> tuple[np.ndarray, int]:
    # Digests compare as bytes, most significant first; the first source of equals is kept.
    order = np.lexsort((entries["source"], entries["low"], entries["high"]))
    entries = entries[order]
    high, low = entries["high"], entries["low"]
    is_new = np.ones(entries.size, bool)
    is_new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return entries[is_new], int(entries.size - is_new.sum())


def _digest(entry: np.void) -> bytes:
    return struct.pack(">QQ", int(entry["high"]), int(entry["low"]))


def _headers(descriptor: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    offset = 0
    while header := os.pread(descriptor, _HEADER.size, offset):
        digest, source, validation, length = _HEADER.unpack(header)
        high, low = struct.unpack(">QQ", digest)
        offset += _HEADER.size
        yield high, low, source, validation, offset, length
        offset += length
