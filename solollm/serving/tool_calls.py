"""Tool calls: which way of writing them a model was tuned for, and reading them out of its text.

The chat template tells: it lays the tools out for the model and shows in which marks calls are
written. Two ways are known: that of Hermes and Qwen (`<tool_call>` around a JSON object), and that
of Llama 3 (the whole answer is a JSON object with `parameters`). A model whose template knows no
tools is not asked to call any.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from solollm.serving.token_engine import Constraint

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"

ToolStyle = Literal["hermes", "llama"]


class CalledTool(NamedTuple):
    """One call: `arguments` is the text of a JSON object."""

    place: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request: their OpenAI definitions, and which must be called, if any."""

    style: ToolStyle
    tools: tuple[dict[str, Any], ...]
    choice: Literal["none", "auto", "required"]
    only: str | None = None  # this one must be called

    @property
    def constraint(self) -> Constraint | None:
        """What makes the model call a tool where it must."""
        if self.choice != "required":
            return None
        wanted = [t["function"] for t in self.tools if self.only in (None, t["function"]["name"])]
        key = "arguments" if self.style == "hermes" else "parameters"
        calls = [_call_schema(function, key) for function in wanted]
        schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
        schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
        if self.style == "llama":
            return Constraint("grammar", f"start: %json {json.dumps(schema)}")
        body = f'start: "{_OPEN}\\n" call "\\n{_CLOSE}"\ncall: %json {json.dumps(schema)}'
        return Constraint("grammar", body)


def tool_style(template: str) -> ToolStyle | None:
    """How a model with this chat template writes calls; None where it was not tuned to."""
    if "tools" not in template:
        return None
    if _OPEN in template:
        return "hermes"
    if _PYTHON_TAG in template or '"parameters"' in template:
        return "llama"
    return None


class ToolParser:
    """Splits one choice's text into what is said and what is called, as it streams."""

    def __init__(self, use: ToolUse) -> None:
        self.num_calls = 0
        self._style = use.style
        self._names = {tool["function"]["name"] for tool in use.tools}
        self._held = ""
        self._is_begun = False  # llama: something was said that begins no JSON object

    def push(self, text: str, *, is_last: bool) -> tuple[str, tuple[CalledTool, ...]]:
        """(text that is said, calls that are complete). What is marked as a call but is none comes
        out as text."""
        self._held += text
        return self._hermes(is_last) if self._style == "hermes" else self._llama(is_last)

    def _hermes(self, is_last: bool) -> tuple[str, tuple[CalledTool, ...]]:
        said: list[str] = []
        calls: list[CalledTool] = []
        while (start := self._held.find(_OPEN)) >= 0:
            end = self._held.find(_CLOSE, start)
            if end < 0:
                break
            said.append(self._held[:start])
            body = self._held[start + len(_OPEN) : end]
            call = self._call(body, "arguments")
            if call is None:
                said.append(self._held[start : end + len(_CLOSE)])
            else:
                calls.append(call)
            self._held = self._held[end + len(_CLOSE) :]
        if is_last:
            said.append(self._held)
            self._held = ""
        elif start < 0:
            keep = _overlap_with(self._held, _OPEN)
            said.append(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
        shown = "".join(said)
        return (shown if shown.strip() or not self.num_calls else ""), tuple(calls)

    def _llama(self, is_last: bool) -> tuple[str, tuple[CalledTool, ...]]:
        if not self._is_begun:
            begun = self._held.lstrip()
            mark = begun.startswith(_PYTHON_TAG) or (
                not is_last and begun and _PYTHON_TAG.startswith(begun)
            )
            self._is_begun = bool(begun) and not mark and not begun.startswith("{")
        if not self._is_begun and not is_last:
            return "", ()
        text, self._held = self._held, ""
        if self._is_begun:
            return text, ()
        call = self._call(text.strip().removeprefix(_PYTHON_TAG), "parameters")
        return ("", (call,)) if call else (text, ())

    def _call(self, body: str, key: str) -> CalledTool | None:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get(key, value.get("arguments", {}))
        if not isinstance(arguments, dict):
            return None
        self.num_calls += 1
        text = json.dumps(arguments, ensure_ascii=False)
        identity = f"call_{secrets.token_hex(12)}"
        return CalledTool(self.num_calls - 1, identity, value["name"], text)


def _call_schema(function: dict[str, Any], key: str) -> dict[str, Any]:
    arguments = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, key: arguments},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _overlap_with(text: str, mark: str) -> int:
    """The longest end of `text` that begins `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
