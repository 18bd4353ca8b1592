"""Reading tool calls out of streamed text."""

from __future__ import annotations

import json

import pytest

from solollm.serving.tool_calls import ToolParser, ToolStyle, ToolUse, tool_style

TOOLS = ({"type": "function", "function": {"name": "f"}},)
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": [1, "</b>"]}}\n</tool_call>'


def _read(style: ToolStyle, text: str, size: int) -> tuple[str, list[tuple[str, object]]]:
    parser = ToolParser(ToolUse(style, TOOLS, "auto"))
    said, calls = "", []
    pieces = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    for piece in pieces:
        shown, called = parser.push(piece, is_last=False)
        said, calls = said + shown, calls + list(called)
    shown, called = parser.push("", is_last=True)
    found = [(call.name, json.loads(call.arguments)) for call in [*calls, *called]]
    return said + shown, found


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_read_however_the_text_is_cut(size: int) -> None:
    """Marks that are seen only in one piece, or leak into what is said."""
    x = {"x": [1, "</b>"]}
    assert _read("hermes", f"Let me see. {CALL}{CALL}", size) == (
        "Let me see. ", [("f", x), ("f", x)],
    )  # fmt: skip
    assert _read("hermes", "a < b <tool", size) == ("a < b <tool", [])
    llama = '<|python_tag|>{"name": "f", "parameters": {"y": 2}}'
    assert _read("llama", llama, size) == ("", [("f", {"y": 2})])
    assert _read("llama", "{ is a brace", size) == ("{ is a brace", [])
    assert _read("llama", "hello", size) == ("hello", [])


@pytest.mark.parametrize(
    "body", ["{", '{"name": "g", "arguments": {}}', '{"name": "f", "arguments": 3}', "[" * 100_000]
)
def test_what_is_no_call_is_shown(body: str) -> None:
    """A model's broken call, that would be hidden or end the stream with a traceback."""
    text = f"<tool_call>{body}</tool_call>"
    assert _read("hermes", text, 50_000) == (text, [])


def test_the_template_tells_the_style() -> None:
    """A base model that is asked to call tools, and answers anything."""
    assert tool_style("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert tool_style("{% if tools %}<|python_tag|>{% endif %}") == "llama"
    assert tool_style("{{ messages }}") is None
