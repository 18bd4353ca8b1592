"""What a row means: the common shapes of instruction data, detected by their keys.

    messages            {"messages": [{"role": "user", "content": "..."}, ...]}
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}
    alpaca              {"instruction": "...", "input": "...", "output": "..."}
    prompt_completion   {"prompt": "...", "completion": "..."}, {"question": ..., "answer": ...}
    preference          {"prompt": "...", "chosen": "...", "rejected": "..."}, or both as messages

All become conversations: lists of messages with a role and a text. What cannot is a problem that
names the row, and a run does not start while there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from solollm.chat_template import ROLES
from solollm.errors import nearest

Shape = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "preference"]
MAX_MESSAGE_CHARS = 250_000
_COMPLETIONS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
Messages = list[dict[str, str]]


class Conversation(NamedTuple):
    """What is trained on. `rejected` is the other answer of a preference pair, empty for all else:
    both end in the assistant's turn, after the same turns before."""

    messages: Messages
    rejected: Messages


class BadRow(Exception):
    """A row that is no conversation; the text says why."""


def detect(row: Mapping[str, Any]) -> Shape | None:
    """The shape of a row by its keys, or None."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if any(prompt in row and answer in row for prompt, answer in _COMPLETIONS):
        return "prompt_completion"
    return None


def conversation(row: Mapping[str, Any], shape: Shape, *, system: str = "") -> Conversation:
    """The conversation of a row of this shape. Raises BadRow."""
    rejected: Messages = []
    if shape == "messages":
        messages = _messages(_need(row, "messages"), role="role", content="content")
    elif shape == "sharegpt":
        messages = _messages(_need(row, "conversations"), role="from", content="value")
    elif shape == "preference":
        messages, rejected = _preference(row)
    else:
        messages = _turns(row, shape)
    if system and messages[0]["role"] != "system":
        first = {"role": "system", "content": system}
        messages = [first, *messages]
        rejected = [first, *rejected] if rejected else []
    _check(messages)
    if shape == "preference":
        _check(rejected)
        if messages[:-1] != rejected[:-1]:
            raise BadRow("chosen and rejected differ before their last turn")
    return Conversation(messages, rejected)


def _turns(row: Mapping[str, Any], shape: Shape) -> Messages:
    """One question and one answer."""
    if shape == "alpaca":
        question = _text(row, "instruction")
        if row.get("input") not in (None, ""):
            question = f"{question}\n\n{_text(row, 'input')}"
        return [_message("user", question), _message("assistant", _text(row, "output"))]
    for prompt, answer in _COMPLETIONS:
        if prompt in row and answer in row:
            return [
                _message("user", _text(row, prompt)), _message("assistant", _text(row, answer))
            ]  # fmt: skip
    raise BadRow(f"has no prompt with its completion; it has {_keys(row)}")


def _preference(row: Mapping[str, Any]) -> tuple[Messages, Messages]:
    pair = []
    for name in ("chosen", "rejected"):
        value = _need(row, name)
        if isinstance(value, str):
            answer = [_message("assistant", value)]
        else:
            answer = _messages(value, role="role", content="content")
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            before = [_message("user", prompt)]
        elif prompt is not None:
            before = _messages(prompt, role="role", content="content")
        else:
            before = []
        pair.append(answer if answer[: len(before)] == before else [*before, *answer])
    return pair[0], pair[1]


def _messages(value: Any, *, role: str, content: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise BadRow(f"its turns are {kind_of(value)}, not a list of messages")
    result = []
    for place, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping):
            raise BadRow(f"message {place} is {kind_of(turn)}, not an object")
        for key in (role, content):
            if key not in turn:
                raise BadRow(f"message {place} has no `{key}`; it has {_keys(turn)}")
        speaker = turn[role]
        if not isinstance(speaker, str):
            raise BadRow(f"`{role}` of message {place} is {kind_of(speaker)}, not text")
        known = _SPEAKERS if role == "from" else {name: name for name in ROLES}
        if speaker not in known:
            hint = nearest(speaker, known) or f"known are {', '.join(known)}"
            raise BadRow(f"`{role}` of message {place} is the unknown {speaker[:40]!r}; {hint}")
        result.append(_message(known[speaker], _content(turn[content], f"message {place}")))
    return result


def _content(value: Any, place: str) -> str:
    """Text, or OpenAI's list of text parts."""
    if isinstance(value, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in value
    ):
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise BadRow(f"the content of {place} is {kind_of(value)}, not text")
    return value


def _check(messages: Messages) -> None:
    """What every conversation must be, whatever its shape was."""
    for place, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if len(content) > MAX_MESSAGE_CHARS:
            count = f"{len(content):,} characters"
            raise BadRow(f"message {place} has {count}, {MAX_MESSAGE_CHARS:,} are allowed")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise BadRow(f"message {place} holds a lone surrogate, which is no text") from None
        if role == "system" and place > 1:
            raise BadRow(f"message {place} is a system prompt in the middle")
        if not content.strip() and role != "system":
            raise BadRow(f"message {place}, the {role}'s, is empty")
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles or roles[0] != "user":
        raise BadRow("begins with no user's turn")
    if roles[-1] != "assistant":
        raise BadRow("ends with a user's turn that nobody answers")
    for place, (role, after) in enumerate(pairwise(roles), 1):
        if role == after:
            raise BadRow(f"turns {place} and {place + 1} are both the {role}'s")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _need(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise BadRow(f"has no `{key}`; it has {_keys(row)}")
    if row[key] is None:
        raise BadRow(f"its `{key}` is null")
    return row[key]


def _text(row: Mapping[str, Any], key: str) -> str:
    value = _need(row, key)
    if not isinstance(value, str):
        raise BadRow(f"`{key}` is {kind_of(value)}, not text")
    return value


def kind_of(value: Any) -> str:
    names = {
        "list": "a list", "dict": "an object", "NoneType": "null", "str": "text",
        "int": "a number", "float": "a number", "bool": "true or false",
    }  # fmt: skip
    kind = type(value).__name__
    return "an empty list" if value == [] else names.get(kind, f"a {kind}")


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(str(key)[:40] for key in list(row)[:8]) or "nothing"
