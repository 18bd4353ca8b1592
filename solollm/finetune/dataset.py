"""From rows to samples: read, detect, lay out, split, cut; every problem named by file and line."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solollm.config import FinetuneTable
from solollm.data.splits import HeldOut
from solollm.errors import ConfigError, DataError, IntegrityError
from solollm.finetune.rendering import Rendered, render
from solollm.finetune.rows import Row, read_rows
from solollm.finetune.samples import Samples, SampleSet
from solollm.finetune.shapes import BadRow, Conversation, Shape, conversation, detect
from solollm.strictfile import read_bytes
from solollm.tokenizer import CHAT_TEMPLATE, Tokenizer

MAX_OVER_LENGTH_SHARE = 0.01
_MAX_SEQ_LEN, _MIN_SEQ_LEN = 2048, 512  # of what is chosen where nothing is said
_SHOWN_PROBLEMS = 5


class Problem(NamedTuple):
    """A row that cannot be trained on, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def folded(problems: Sequence[Problem]) -> list[str]:
    """One line per reason: the first row that has it, and how many more."""
    more = Counter(problem.reason for problem in problems)
    first = {problem.reason: problem for problem in reversed(problems)}
    lines = [first[reason] for reason in more]  # in the order of the rows
    return [
        f"{one}" + (f" ({more[one.reason] - 1:,} more like it)" if more[one.reason] > 1 else "")
        for one in lines
    ]


def counted_rows(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")


class Laid(NamedTuple):
    """One conversation laid out: one sample, or the two of a preference pair."""

    place: str
    conversation: Conversation
    samples: tuple[Rendered, ...]

    @property
    def num_positions(self) -> int:
        return max(len(sample.ids) for sample in self.samples) - 1


@dataclass
class Reading:
    """What reading the rows gave, good or bad."""

    tokenizer: Tokenizer
    train: list[Laid] = field(default_factory=list)
    held_out: list[Laid] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def laid(self) -> list[Laid]:
        return [*self.train, *self.held_out]

    @property
    def longest(self) -> int:
        return max((one.num_positions for one in self.laid), default=0)

    def over_length(self, seq_len: int) -> list[Laid]:
        return [one for one in self.laid if one.num_positions > seq_len]

    def require_whole(self) -> None:
        """Raise DataError where a row has a problem, or nothing is left to train on."""
        if self.problems:
            lines = folded(self.problems)
            more = len(lines) - _SHOWN_PROBLEMS
            raise DataError(
                f"{counted_rows(len(self.problems))} cannot be trained on",
                why="; ".join(lines[:_SHOWN_PROBLEMS])
                + (f"; and {more:,} other reasons" if more > 0 else ""),
                fix="mend or remove these rows; `solollm finetune --check` lists them all",
            )
        if not self.train:
            raise DataError("there is no row to train on", fix="give --data FILE")


def tokenizer_for(base: Path, table: FinetuneTable) -> Tokenizer:
    """The base's tokenizer, with the template of the config where it names one.

    Raises:
        ConfigError: no template to lay conversations out with.
    """
    tokenizer = Tokenizer.load(base)
    if table.template:
        files = {**tokenizer.files(), CHAT_TEMPLATE: read_bytes(Path(table.template))}
        tokenizer = Tokenizer(files, source=base)
    try:
        tokenizer.chat_template.render([{"role": "user", "content": "?"}], True)
    except ConfigError as error:
        raise ConfigError(
            f"conversations cannot be laid out for {base}",
            why=str(error),
            fix="give a Jinja template whose markers are special tokens of its tokenizer:"
            " --set finetune.template=FILE",
        ) from error
    return tokenizer


def read_conversations(table: FinetuneTable, tokenizer: Tokenizer) -> Reading:
    """Read and lay out every row; what cannot be is listed in `problems`."""
    reading = Reading(tokenizer)
    split = HeldOut(fraction=0.0 if table.held_out else table.held_out_fraction)
    for one in _laid_out(table.data, table, reading):
        text = one.samples[0].ids.tobytes()
        digest = hashlib.blake2b(text, digest_size=16).digest()
        (reading.held_out if split.takes(text, digest) else reading.train).append(one)
    if table.held_out:
        reading.held_out += _laid_out(table.held_out, table, reading)
    if not reading.train and reading.held_out:  # too few rows for a share of them
        reading.train, reading.held_out = reading.held_out, []
    return reading


def _laid_out(sources: Sequence[str], table: FinetuneTable, reading: Reading) -> Iterator[Laid]:
    for row in read_rows(sources):
        try:
            yield _lay_out(row, table, reading)
        except (BadRow, ConfigError, IntegrityError) as error:
            reading.problems.append(Problem(row.place, str(error)))


def _lay_out(row: Row, table: FinetuneTable, reading: Reading) -> Laid:
    if row.problem:
        raise BadRow(row.problem)
    shape: Shape | None = detect(row.value) if table.shape == "auto" else table.shape
    if shape is None:
        keys = ", ".join(str(key)[:40] for key in list(row.value)[:8]) or "nothing"
        raise BadRow(f"is of no known shape; it has {keys}")
    wanted = "preference" if table.objective == "dpo" else ""
    if wanted and shape != wanted:
        raise BadRow(f"is of the shape {shape}; DPO needs chosen and rejected answers")
    reading.shapes[shape] += 1
    found = conversation(row.value, shape, system=table.system)
    if wanted and found.messages == found.rejected:
        raise BadRow("chosen and rejected are the same answer")
    turns = [found.messages, found.rejected] if wanted else [found.messages]
    samples = tuple(render(reading.tokenizer, messages) for messages in turns)
    if not all(sample.produced[1:].any() for sample in samples):
        raise BadRow("the template marks nothing of it as the assistant's")
    return Laid(row.place, found, samples)


def row_length(
    reading: Reading, table: FinetuneTable, *, asked: int | None, max_positions: int
) -> int:
    """`data.seq_len`, or what the longest sample needs within what the model reaches."""
    if asked is not None:
        return asked
    drawn = table.grpo.max_new_tokens if table.objective == "grpo" else 0
    needed = max(_MIN_SEQ_LEN, -(-(reading.longest + drawn) // 64) * 64)
    return min(needed, _MAX_SEQ_LEN, max_positions)


def sample_set(reading: Reading, table: FinetuneTable, seq_len: int) -> SampleSet:
    """The samples that a run keeps. Those longer than a row are dropped or cut as the config says.

    Raises:
        DataError: rows with problems, or more too long ones than are let pass without a word.
    """
    reading.require_whole()
    too_long = reading.over_length(seq_len)
    share = len(too_long) / len(reading.laid)
    if table.over_length == "refuse" and share > MAX_OVER_LENGTH_SHARE:
        raise DataError(
            f"{len(too_long):,} of {len(reading.laid):,} samples ({share:.1%}) are longer than a"
            f" row of {seq_len} tokens, the first at {too_long[0].place}",
            why=f"the longest has {reading.longest:,}; up to {MAX_OVER_LENGTH_SHARE:.0%} is let"
            " pass without being asked",
            fix=f"--set data.seq_len={reading.longest}, or say what becomes of them:"
            " --set finetune.over_length=drop (or cut_start, cut_end)",
        )
    group = 2 if table.objective == "dpo" else 1
    train, held_out = (
        Samples.of(list(_fitted(part, table, seq_len)), group=group)
        for part in (reading.train, reading.held_out)
    )
    if not train.num_samples:
        raise DataError(f"no sample fits into a row of {seq_len} tokens")
    names = [Path(source).name if "://" not in source else source for source in table.data]
    return SampleSet.of(
        reading.tokenizer, train, held_out, shapes=dict(reading.shapes), sources=names
    )


def _fitted(laid: Sequence[Laid], table: FinetuneTable, seq_len: int) -> Iterator[Rendered]:
    for one in laid:
        samples = [_cut(sample, table.over_length, seq_len) for sample in one.samples]
        if all(len(sample.ids) and sample.produced[1:].any() for sample in samples):
            yield from samples


def _cut(sample: Rendered, rule: str, seq_len: int) -> Rendered:
    """The sample, its part that fits, or nothing of it."""
    count = seq_len + 1
    if len(sample.ids) <= count:
        return sample
    kept = {"cut_start": slice(-count, None), "cut_end": slice(count)}.get(rule, slice(0))
    return Rendered(np.ascontiguousarray(sample.ids[kept]), sample.produced[kept])
