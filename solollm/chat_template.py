"""How a conversation is laid out as text: one Jinja template, rendered in a sandbox.

The template is written into every checkpoint as `chat_template.jinja`, so transformers, mlx-lm
and vLLM lay conversations out as training did. `{% generation %}` marks what the assistant
produces. Token ids of a conversation: `Tokenizer.encode_chat`.

The sandbox keeps a template from running code, not from looping or growing for ever; so only
SoloLLM's own template is rendered in this process, and foreign ones in a confined child.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, NoReturn

from solollm.confined import Confined, Refusal
from solollm.errors import ConfigError, nearest

ROLES = ("system", "user", "assistant")
# {"role", "content"} as texts; where the template knows tools, `tool_calls` and the like too.
Message = Mapping[str, Any]

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

RENDER_SECONDS = 2.0
MAX_RENDERED_CHARS = 1 << 20

# U+FDD0 is reserved for use inside programs. With a digit behind it, it marks places in rendered
# text; where a message itself holds one, it is written as `_ITSELF`.
_MARK = "\ufdd0"
_ITSELF, _BREAK, _BEGIN, _END = (_MARK + digit for digit in "0123")


class Part(NamedTuple):
    """A piece of a rendered conversation: one special token, or text between them."""

    text: str
    is_special: bool
    is_produced: bool  # by the assistant


class ChatTemplate:
    """A chat template and the special tokens that it may name (`bos_token` and so on)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.is_own = source == TEMPLATE
        self._names = dict(special_tokens)
        self._child = None if self.is_own else Confined(
            "solollm.chat_template:render_request", seconds=RENDER_SECONDS
        )  # fmt: skip

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself what the assistant produces."""
        return re.search(r"\{%[-+]?\s*generation\b", self.source) is not None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text.

        Raises:
            ConfigError: a message without role or content, an unknown role, a conversation that
                a foreign template refuses.
            IntegrityError: a foreign template that fails, or exceeds its time, memory or output.
        """
        shielded = [_shielded(message, None) for message in self._checked(messages)]
        variables = {"messages": shielded, "add_generation_prompt": add_generation_prompt}
        return "".join(_mended(part) for part in self._pieces(variables, ""))

    def parts(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        special_tokens: Mapping[str, int],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Iterator[Part]:
        """The conversation in pieces. Special tokens are recognised only where the template
        wrote them: those inside messages and tools are broken up before rendering and mended
        after. `tools`: OpenAI's definitions, laid out by templates that know tools."""
        by_length = sorted(special_tokens, key=len, reverse=True)
        tokens = "|".join(re.escape(token) for token in by_length)
        variables = {
            "messages": [_shielded(message, tokens) for message in self._checked(messages)],
            "add_generation_prompt": add_generation_prompt,
            "tools": [_shielded(tool, tokens) for tool in tools] or None,
        }
        is_produced = False
        for piece in self._pieces(variables, tokens):
            if piece in (_BEGIN, _END):
                is_produced = piece == _BEGIN
            elif piece in special_tokens:
                yield Part(piece, True, is_produced)
            elif piece:
                yield Part(_mended(piece), False, is_produced)

    def _pieces(self, variables: Mapping[str, Any], tokens: str) -> list[str]:
        request = {"source": self.source, "variables": {**self._names, **variables}}
        try:
            rendered = self._child.ask(request) if self._child else render_request(request)
        except Refusal as refusal:
            raise ConfigError(
                "the chat template refuses this conversation", why=str(refusal)
            ) from refusal
        marks = f"{_BEGIN}|{_END}"
        return re.split(f"({tokens}|{marks})" if tokens else f"({marks})", rendered)

    def _checked(self, messages: Sequence[Message]) -> Sequence[Message]:
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise ConfigError(f"a conversation is a list of messages, not {messages!r:.80}")
        if not messages:
            raise ConfigError("the conversation is empty", fix="give at least one message")
        for place, message in enumerate(messages):
            _check_message(message, place, ROLES if self.is_own else ())
        return messages


def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as text, by SoloLLM's own template."""
    return ChatTemplate(TEMPLATE, {"bos_token": "<|bos|>"}).render(messages, add_generation_prompt)


def render_request(request: Mapping[str, Any]) -> str:
    """The text of `request["source"]` with `request["variables"]`; runs in a confined child for
    foreign templates. Raises Refusal where the template or Jinja objects to the conversation."""
    from jinja2 import TemplateError

    chunks: list[str] = []
    size = 0
    try:
        for chunk in _compiled(request["source"]).generate(request["variables"]):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_RENDERED_CHARS:
                raise Refusal(f"it renders to more than {MAX_RENDERED_CHARS:,} characters")
    except (TemplateError, RecursionError, TypeError) as error:
        raise Refusal(f"{type(error).__name__}: {error}") from error
    return "".join(chunks)


def _check_message(message: object, place: int, roles: Sequence[str]) -> None:
    if not isinstance(message, Mapping):
        raise ConfigError(f"message {place} is a {type(message).__name__}, not a mapping")
    for key in ("role", "content"):
        if key not in message:
            raise ConfigError(f"message {place} has no `{key}`: {message!r:.80}")
        if not isinstance(message[key], str):
            kind = type(message[key]).__name__
            raise ConfigError(f"`{key}` of message {place} is a {kind}, not text")
    if roles and message["role"] not in roles:
        raise ConfigError(
            f"message {place} has the role {message['role']!r}",
            why=nearest(message["role"], roles),
            fix=f"the roles are {', '.join(roles)}",
        )


def _shielded(value: Any, tokens: str | None) -> Any:
    """A message or tool in which this module's mark, and special tokens, are made harmless."""
    if isinstance(value, str):
        text = value.replace(_MARK, _ITSELF)
        return re.sub(tokens, lambda m: m[0][0] + _BREAK + m[0][1:], text) if tokens else text
    if isinstance(value, Mapping):
        return {_shielded(k, tokens): _shielded(v, tokens) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_shielded(item, tokens) for item in value]
    return value


def _mended(piece: str) -> str:
    if piece in (_BEGIN, _END):
        return ""
    return piece.replace(_BREAK, "").replace(_ITSELF, _MARK)


@cache
def _compiled(source: str) -> Any:
    """The Jinja template, compiled in an environment like that of transformers."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`...`{% endgeneration %}`."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (
                nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END)
            )
            return [begin, *body, end]

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )

    def tojson(value: Any, **options: Any) -> str:
        # Jinja's own escapes `<` and `&` for web pages, which models were not trained on.
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment.from_string(source)
