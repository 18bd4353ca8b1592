"""A conversation as token ids, and which of them the assistant has to produce.

SoloLLM's template, and any other with `{% generation %}`, says itself what the assistant produces.
Of the others this is found out: what stands before an answer is what the template makes of the
turns before with its generation prompt, and the answer ends with the first end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from solollm.chat_template import Message, Part
from solollm.errors import ConfigError
from solollm.tokenizer import Tokenizer


class Rendered(NamedTuple):
    """`ids` int32 [n], `produced` bool [n]: by the assistant, and so trained."""

    ids: np.ndarray
    produced: np.ndarray


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """Lay out a whole conversation.

    Raises:
        ConfigError: a conversation or template that this cannot be said of.
        IntegrityError: a foreign template that fails or exceeds its limits.
    """
    if tokenizer.chat_template.marks_generation:
        ids, produced = tokenizer.encode_chat(messages)
    else:
        ids, produced = _found_out(tokenizer, messages)
    return Rendered(np.array(ids, np.int32), np.array(produced, bool))


def answer_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """`generation_config.json` of a model that answers: what ends a turn ends a generation."""
    ends = sorted(tokenizer.stop_ids, key=lambda end: end != tokenizer.end_id)
    return {**tokenizer.token_ids, "eos_token_id": ends}


def _found_out(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    whole = _parts(tokenizer, messages)
    starts = [_start(tokenizer, messages, place, _text(whole)) for place in _answers(messages)]
    ends = (tokenizer.end_id, tokenizer.eos_id)
    ids: list[int] = []
    produced: list[bool] = []
    position, answering = 0, False
    for part in whole:
        inside = [start for start in starts if position < start < position + len(part.text)]
        for text in _cut(part.text, [start - position for start in inside]):
            answering = answering or position in starts
            new = [tokenizer.special_tokens[text]] if part.is_special else tokenizer.encode(text)
            ids += new
            produced += [answering] * len(new)
            position += len(text)
            if part.is_special and new[0] in ends:
                answering = False
    return ids, produced


def _start(tokenizer: Tokenizer, messages: Sequence[Message], place: int, whole: str) -> int:
    """Where the answer at `place` begins in the text of the whole conversation."""
    before = _text(_parts(tokenizer, messages[:place], prompt=True))
    if not whole.startswith(before):
        raise ConfigError(
            f"the chat template writes what stands before message {place + 1} otherwise once it is"
            " answered",
            why="the model would be asked in another form than it was trained on",
            fix="give a template with {% generation %} around what the assistant produces:"
            " --set finetune.template=FILE",
        )
    return len(before)


def _answers(messages: Sequence[Message]) -> list[int]:
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _parts(
    tokenizer: Tokenizer, messages: Sequence[Message], *, prompt: bool = False
) -> list[Part]:
    return list(tokenizer.chat_template.parts(messages, prompt, tokenizer.special_tokens))


def _text(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts)


def _cut(text: str, at: Sequence[int]) -> list[str]:
    """The text in pieces, cut where answers begin inside it."""
    borders = [0, *at, len(text)]
    return [text[a:b] for a, b in pairwise(borders)]
