"""How a conversation is laid out as text: one Jinja template, rendered in a sandbox.

The template is written into every checkpoint as `chat_template.jinja`, so transformers, mlx-lm
and vLLM lay conversations out as training did. `{% generation %}` marks what the assistant
produces. Token ids of a conversation: `Tokenizer.encode_chat`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from solollm.errors import ConfigError, nearest

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

# A character that no Unicode text may exchange; `_ESCAPE + digit` are this module's marks.
_ESCAPE = "\ufdd0"
_ITSELF, _BREAK, _BEGIN, _END = (_ESCAPE + digit for digit in "0123")


class ChatTemplate:
    """A chat template and the special tokens it may name (`bos_token` and so on)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._names = dict(special_tokens)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text.

        Raises:
            ConfigError: a message without role or content, or with an unknown role.
        """
        marked = self._render(_checked(messages), add_generation_prompt)
        return marked.replace(_BEGIN, "").replace(_END, "")

    def segments(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        special: Mapping[str, int],
    ) -> Iterator[tuple[str, bool, bool]]:
        """(text, is a special token, is produced by the assistant) pieces of the conversation.

        Special tokens are recognised only where the template wrote them: those inside messages
        are broken up before rendering and mended after.
        """
        tokens = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)))

        def shield(text: str) -> str:
            text = text.replace(_ESCAPE, _ITSELF)
            return tokens.sub(lambda match: match[0][0] + _BREAK + match[0][1:], text)

        shielded = [
            {key: shield(value) for key, value in message.items()} for message in _checked(messages)
        ]
        rendered = self._render(shielded, add_generation_prompt)
        produced = False
        for part in re.split(f"({tokens.pattern}|{_BEGIN}|{_END})", rendered):
            if part in (_BEGIN, _END):
                produced = part == _BEGIN
            elif part in special:
                yield part, True, produced
            elif part:
                yield part.replace(_BREAK, "").replace(_ITSELF, _ESCAPE), False, produced

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        template = _environment().from_string(self.source)
        return str(
            template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._names
            )
        )


def render(
    messages: Sequence[Message], add_generation_prompt: bool = False, *, bos_token: str = "<|bos|>"
) -> str:
    """The conversation as text, by SoloLLM's own template."""
    return ChatTemplate(TEMPLATE, {"bos_token": bos_token}).render(messages, add_generation_prompt)


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError("a conversation is a non-empty list of messages, not " + repr(messages))
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigError(f"message {place} is a {type(message).__name__}, not a mapping")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ConfigError(f"message {place} has no text under `{key}`: {message!r:.200}")
        if message["role"] not in ROLES:
            raise ConfigError(
                f"message {place} has the role {message['role']!r}",
                why=nearest(message["role"], ROLES),
                fix=f"the roles are {', '.join(ROLES)}",
            )
    return messages


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin = nodes.Output([nodes.TemplateData(_BEGIN)], lineno=line)
            return [begin, *body, nodes.Output([nodes.TemplateData(_END)], lineno=line)]

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation]
    )
