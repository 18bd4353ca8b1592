"""How well a vocabulary fits a text; and training one from sources with such a measurement.

`solollm tokenizer train|inspect` are skins over the two functions here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from solollm.data.cleaning import Defect, normalise
from solollm.data.dedup import text_digest
from solollm.data.items import Broken, Document
from solollm.data.sources import read_documents
from solollm.data.splits import HeldOut
from solollm.errors import ConfigError, DataError
from solollm.tokenizer import TOKENIZER, Tokenizer
from solollm.tokenizer_training import train_tokenizer

MAX_MEASURED_BYTES = 8 << 20
_HELD_OUT = HeldOut("hash", 0.02)
_BATCH_CHARS = 1 << 20
_SAMPLE_CHARS = 600


@dataclass(frozen=True)
class TokenizerReport:
    """What a tokenizer does to a text. `unused_tokens` counts the merged tokens that never came
    up in it; `longest_tokens` and `unused_examples` are texts of tokens; `sample` is the start of
    the text, token by token."""

    measured_on: str
    text_bytes: int
    num_tokens: int
    vocab_size: int
    padded_vocab_size: int
    special_tokens: int
    used_tokens: int
    unused_tokens: int
    unused_examples: tuple[str, ...]
    longest_tokens: tuple[str, ...]
    sample: tuple[str, ...]
    skipped_items: int = 0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 that one token stands for, on average: more is a shorter training."""
        return self.text_bytes / self.num_tokens

    @property
    def used_fraction(self) -> float:
        """Share of the ordinary (not special) vocabulary that came up."""
        return self.used_tokens / (self.vocab_size - self.special_tokens)


def train_from_sources(
    sources: Sequence[str],
    out: str | Path,
    *,
    vocab_size: int,
    max_bytes: int | None = None,
    overwrite: bool = False,
) -> TokenizerReport:
    """Train a tokenizer on documents, save it in `out`, and measure it on others.

    Two in a hundred documents, chosen by their text, are held out; where that leaves none, the
    report says that it measured on the training text. Duplicates count once.

    Raises:
        ConfigError: a source that does not exist, a vocabulary that is too small, or a tokenizer
            that stands at `out` already.
        DataError: the sources hold no usable text.
    """
    if (Path(out) / TOKENIZER).exists() and not overwrite:
        raise ConfigError(
            f"{out} holds a tokenizer already",
            why="corpora and models made with it could not be read any more",
            fix="name another --out, or say --overwrite",
        )
    documents = _Documents(sources)
    tokenizer = train_tokenizer(documents.training_texts(), vocab_size, max_bytes=max_bytes)
    if not documents.first_text:
        raise DataError(
            "the sources hold no text to train on",
            why=f"{documents.skipped} items could not be used",
            fix="give text files, JSON lines with a `text` field, or folders of them",
        )
    tokenizer.save(out)
    if documents.held_out:
        name, texts = "held-out documents", documents.held_out
    else:
        name, texts = "training text (no document was held out)", [documents.first_text]
    return inspect_tokenizer(tokenizer, texts, measured_on=name, skipped_items=documents.skipped)


def inspect_sources(tokenizer: Tokenizer, sources: Sequence[str]) -> TokenizerReport:
    """Measure a tokenizer on the first 8 MiB of the documents of `sources`."""
    documents = _Documents(sources)
    texts: list[str] = []
    num_chars = 0
    for text, _ in documents.texts():
        texts.append(text)
        num_chars += len(text)
        if num_chars >= MAX_MEASURED_BYTES:
            break
    return inspect_tokenizer(
        tokenizer, texts, measured_on=", ".join(sources), skipped_items=documents.skipped
    )


def inspect_tokenizer(
    tokenizer: Tokenizer, texts: Iterable[str], *, measured_on: str, skipped_items: int = 0
) -> TokenizerReport:
    """Measure a tokenizer. Raises DataError if `texts` hold nothing."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    text_bytes = 0
    sample: tuple[str, ...] = ()
    for batch in _batches(texts):
        text_bytes += sum(len(text.encode()) for text in batch)
        for ids in tokenizer.encode_batch(batch):
            counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        if not sample:
            first = next((text for text in batch if text), "")
            sampled = tokenizer.encode(first[:_SAMPLE_CHARS])
            sample = tuple(_shown(tokenizer.token_bytes(i)) for i in sampled)
    if not counts.any():
        raise DataError("there is no text to measure on", fix="give --text or other sources")
    special = set(tokenizer.special_tokens.values())
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in special]
    merged = [i for i in ordinary if len(tokenizer.token_bytes(i)) > 1]
    unused = [i for i in merged if counts[i] == 0]
    longest = sorted(merged, key=lambda i: (-len(tokenizer.token_bytes(i)), i))
    return TokenizerReport(
        measured_on=measured_on,
        text_bytes=text_bytes,
        num_tokens=int(counts.sum()),
        vocab_size=tokenizer.vocab_size,
        padded_vocab_size=tokenizer.padded_vocab_size,
        special_tokens=len(special),
        used_tokens=int(np.count_nonzero(counts)),
        unused_tokens=len(unused),
        unused_examples=tuple(_shown(tokenizer.token_bytes(i)) for i in unused[:10]),
        longest_tokens=tuple(_shown(tokenizer.token_bytes(i)) for i in longest[:10]),
        sample=sample,
        skipped_items=skipped_items,
    )


@dataclass
class _Documents:
    """The distinct texts of some sources, and what had to be left out of them."""

    sources: Sequence[str]
    skipped: int = 0
    first_text: str = ""
    held_out: list[str] = field(default_factory=list)

    def texts(self) -> Iterator[tuple[str, bool]]:
        """(text, is it held out)."""
        seen: set[bytes] = set()
        for item in read_documents(self.sources):
            text = self._usable(item)
            content = text.encode()
            digest = text_digest(content)
            if content and digest not in seen:
                seen.add(digest)
                yield text, _HELD_OUT.takes(content, digest)

    def training_texts(self) -> Iterator[str]:
        """The texts that are not held out; the others are kept in `held_out`, up to 8 MiB."""
        num_chars = 0
        for text, is_held_out in self.texts():
            if not is_held_out:
                self.first_text = self.first_text or text
                yield text
            elif num_chars < MAX_MEASURED_BYTES:
                self.held_out.append(text)
                num_chars += len(text)

    def _usable(self, item: object) -> str:
        if isinstance(item, Document):
            try:
                return normalise(item.text)
            except Defect:
                self.skipped += 1
        elif isinstance(item, Broken):
            self.skipped += 1
        return ""


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    yield batch


def _shown(token: bytes) -> str:
    """A token as text; one that ends inside a character as its bytes."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02x}>" for byte in token)
