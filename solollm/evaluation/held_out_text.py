"""Bits per byte: how well a model predicts text, whatever its tokenizer.

Every document is scored from its own beginning: bos, its tokens, eos, in disjoint windows of the
model's whole context, as lm-eval scores perplexity. A training log's figure differs a little from
this one: there the rows of the stream begin in the middle of documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from solollm.completion import TextModel
from solollm.data.items import Broken, Document
from solollm.data.sources import read_documents
from solollm.errors import ConfigError, DataError
from solollm.generation import loglikelihood
from solollm.runs import Run

DEFAULT_BYTES = 1_000_000
_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class TextScore:
    """`interval`: 95%, over the documents; None for a single one. `is_whole`: no document of the
    text was left out."""

    name: str
    bits_per_byte: float
    interval: tuple[float, float] | None
    nats_per_token: float
    num_documents: int
    num_bytes: int
    num_tokens: int
    is_whole: bool


def file_documents(path: Path) -> Iterator[str]:
    """The texts of a file or folder, in any format that corpora are built from.

    Raises:
        ConfigError: nothing there.
        DataError: an item that cannot be read, since a figure over the rest would be another one.
    """
    for item in read_documents([str(path)]):
        if isinstance(item, Broken):
            raise DataError(
                f"{item.source} {item.place} cannot be read: {item.reason}", why=item.detail,
                fix="mend the file, or take it out of the folder",
            )  # fmt: skip
        if isinstance(item, Document) and item.text:
            yield item.text


def run_corpus(run: Run) -> Path | None:
    """Where the corpus of a run lies, if it is here: `run.toml` names it as seen from the run."""
    named = run.config.data.corpus
    corpus = (run.path.resolve() / named).resolve()
    return corpus if named and (corpus / "index.json").is_file() else None


def score_text(
    model: TextModel,
    documents: Iterable[str],
    *,
    name: str,
    max_bytes: int = DEFAULT_BYTES,
    tell: Callable[[str, int, int], None] = lambda kind, done, total: None,
) -> TextScore:
    """Bits per byte over documents, in their order, until `max_bytes` are read (0: all); the last
    one may be cut.

    Raises:
        ConfigError: no text at all.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    sizes: list[int] = []  # bytes of each document
    windows: list[int] = []  # pairs of each document
    is_whole = True
    for text in documents:
        content = text.encode("utf-8", "replace")
        left = max_bytes - sum(sizes) if max_bytes else len(content)
        if len(content) > left:
            is_whole = False
            text = content[:left].decode("utf-8", "ignore")
        if not text:
            break
        new = list(_windows(model, text))
        pairs += new
        windows.append(len(new))
        sizes.append(len(text.encode("utf-8", "replace")))
        if not is_whole:
            break
    if not sum(sizes):
        raise ConfigError(f"{name} holds no text", fix="give a file with text in it: --text FILE")
    scores = loglikelihood(
        model.engine, pairs, tell=lambda done, total: tell("bits per byte", done, total)
    )
    nll: list[float] = []
    first = 0
    for count in windows:
        nll.append(-sum(score for score, _ in scores[first : first + count]))
        first += count
    tokens = sum(len(continuation) for _, continuation in pairs)
    bits = [value / math.log(2) for value in nll]
    rate = sum(bits) / sum(sizes)
    return TextScore(
        name, rate, _interval(bits, sizes, rate), sum(nll) / tokens,
        len(sizes), sum(sizes), tokens, is_whole,
    )  # fmt: skip


def _windows(model: TextModel, text: str) -> Iterator[tuple[list[int], list[int]]]:
    tokenizer, size = model.tokenizer, model.max_seq_len
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    for start in range(0, len(ids) - 1, size):
        yield ids[start : start + 1], ids[start + 1 : start + size + 1]


def _interval(bits: list[float], sizes: list[int], rate: float) -> tuple[float, float] | None:
    """Of a ratio of sums over documents, linearised (Cochran, Sampling Techniques, 6.3)."""
    count = len(bits)
    if count < 2:
        return None
    squares = sum((b - rate * size) ** 2 for b, size in zip(bits, sizes, strict=True))
    error = math.sqrt(squares * count / (count - 1)) / sum(sizes)
    return (rate - _Z95 * error, rate + _Z95 * error)
