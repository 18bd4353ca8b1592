"""What the data looks like, and whether a model tuned on it would know when to stop."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solollm.config import FinetuneTable
from solollm.errors import DataError
from solollm.finetune.dataset import (
    MAX_OVER_LENGTH_SHARE,
    Laid,
    Problem,
    Reading,
    counted_rows,
)
from solollm.finetune.rendering import Rendered
from solollm.finetune.rewards import final_answer
from solollm.model_folder import CONFIG, GENERATION
from solollm.strictfile import read_table
from solollm.tensorfile import FLOATS, open_weights
from solollm.tokenizer import Tokenizer

_SAME_DIRECTION = 0.999  # cosine; 1 - 3e-7 in a base, 0.995 after a hundred steps of tuning
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Findings:
    """What was found. `faults`: each a reason not to start; `warnings`: what may be meant so;
    `problems`: rows that cannot be used; `num_targets`: tokens of `num_train` samples that carry
    loss; `truncated`: samples longer than `seq_len`, held out ones too."""

    objective: str
    shapes: dict[str, int]
    num_train: int
    num_held_out: int
    num_targets: int
    longest: int
    seq_len: int
    truncated: int
    problems: tuple[Problem, ...]
    faults: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def require_sound(self) -> None:
        """Raise DataError with every fault."""
        if self.faults:
            raise DataError(
                "a model tuned on this would not be what it seems",
                why="; ".join(self.faults),
                fix="`solollm finetune ... --check` shows samples with the trained tokens marked",
            )

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        names = ("problems", "faults", "warnings")
        lists = {name: [str(one) for one in getattr(self, name)] for name in names}
        return {**vars(self), **lists}


def examine(reading: Reading, table: FinetuneTable, base: Path, *, seq_len: int) -> Findings:
    """Look at everything that was read."""
    samples = [sample for one in reading.laid for sample in one.samples]
    too_long = reading.over_length(seq_len)
    faults = [*_ending_faults(samples, reading.tokenizer), *_id_faults(base, reading.tokenizer)]
    share = len(too_long) / max(1, len(reading.laid))
    if share > MAX_OVER_LENGTH_SHARE and table.over_length == "refuse":
        faults.append(
            f"{len(too_long):,} samples ({share:.1%}) are longer than {seq_len} tokens, the first"
            f" at {too_long[0].place}, and finetune.over_length does not say what becomes of them"
        )
    if reading.problems:
        count = counted_rows(len(reading.problems))
        faults.append(f"{count} cannot be trained on: mend or remove what is named")
    elif not reading.train:
        faults.append("there is no row to train on")
    unrewarded = [one for one in reading.laid if not _can_be_rewarded(table, one)]
    warnings = _unlearnt(base, reading.tokenizer) if table.method != "full" else []
    if unrewarded:
        said = (
            f"{counted_rows(len(unrewarded))} without the `#### N` or `The answer is N` that the"
            f" reward gsm8k looks for, the first at {unrewarded[0].place}: never rewarded"
        )
        (faults if len(unrewarded) == len(reading.laid) else warnings).append(said)
    return Findings(
        objective=table.objective,
        shapes=dict(reading.shapes),
        num_train=len(reading.train),
        num_held_out=len(reading.held_out),
        num_targets=sum(
            int(sample.produced[1:].sum()) for one in reading.train for sample in one.samples
        ),
        longest=reading.longest,
        seq_len=seq_len,
        truncated=len(too_long),
        problems=tuple(reading.problems),
        faults=tuple(faults),
        warnings=tuple(warnings),
    )


def _can_be_rewarded(table: FinetuneTable, one: Laid) -> bool:
    """Whether a right answer could be known as one. Of regex and functions only they can say."""
    if table.objective != "grpo" or table.grpo.reward != "gsm8k":
        return True
    return final_answer(one.conversation.messages[-1]["content"]) is not None


def _unlearnt(base: Path, tokenizer: Tokenizer) -> list[str]:
    """Whether the base has ever seen the end of a turn: adapters leave its embedding as it is.

    A token that was never a target has only been pushed away, and so points where every such token
    points, the padding too (Land and Bartolo, 2024, "Fishing for Magikarp").
    """
    if tokenizer.pad_id in tokenizer.stop_ids or not (base / CONFIG).is_file():
        return []
    with contextlib.closing(open_weights(base)) as weights:
        name = _HEAD if _HEAD in weights.names() else _EMBEDDING
        if name not in weights.names() or weights.info(name).dtype not in FLOATS:
            return []  # quantised, or with names of its own
        end, pad = (weights.row(name, token) for token in (tokenizer.end_id, tokenizer.pad_id))
    norms = float(np.linalg.norm(end) * np.linalg.norm(pad))
    if norms == 0 or float(end @ pad) / norms < _SAME_DIRECTION:
        return []
    return [
        f"the base never learnt the end of turn {_token(tokenizer, tokenizer.end_id)}, and an"
        " adapter leaves its embedding as it is: the tuned model would hardly ever stop by itself;"
        " `--method full` teaches it"
    ]


def _ending_faults(samples: Sequence[Rendered], tokenizer: Tokenizer) -> list[str]:
    """Whether every answer ends in a token that ends generation, and learns it."""
    last: Counter[int] = Counter()
    after: Counter[int] = Counter()
    for ids, produced in samples:
        ends = np.flatnonzero(produced & ~np.append(produced[1:], False))
        last.update(ids[ends].tolist())
        after.update(ids[ends[ends + 1 < len(ids)] + 1].tolist())
    wrong = {token: n for token, n in last.items() if token not in tokenizer.stop_ids}
    if not wrong:
        return []
    shown = _token(tokenizer, max(wrong, key=lambda token: wrong[token]))
    follows = [token for token in after if token in tokenizer.stop_ids]
    if follows:
        return [
            f"the end of turn {_token(tokenizer, follows[0])} carries no loss:"
            f" {sum(wrong.values()):,} answers are trained up to {shown} only, and a model would"
            " never stop"
        ]
    names = ", ".join(_token(tokenizer, i) for i in sorted(tokenizer.stop_ids))
    return [
        f"{sum(wrong.values()):,} answers end with {shown}, which ends no generation: tokenizer and"
        f" template disagree on eos (the tokenizer's are {names})"
    ]


def _id_faults(base: Path, tokenizer: Tokenizer) -> list[str]:
    """Whether the base's own files agree with its tokenizer on what ends a text."""
    faults = []
    for name in (CONFIG, GENERATION):
        if not (base / name).is_file():
            continue
        value = read_table(base / name).get("eos_token_id")
        ends = value if isinstance(value, list) else [] if value is None else [value]
        if ends and not tokenizer.stop_ids & set(ends):
            names = ", ".join(_token(tokenizer, i) for i in sorted(tokenizer.stop_ids))
            said = f"{name} of the base ends with ids {ends}"
            faults.append(f"eos disagrees: {said}, its tokenizer with {names}")
    return faults


def _token(tokenizer: Tokenizer, token: int) -> str:
    text = tokenizer.decode([token], skip_special=False) if token < tokenizer.vocab_size else "?"
    return f"{text!r} ({token})"
