"""The documents of OpenAI's API that answers are sent as: whole ones, and the chunks of streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from solollm.serving.answering import FinishReason, Piece, Scored
from solollm.serving.tool_calls import CalledTool

Document = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What all documents of one answer share."""

    id: str
    model: str
    created: int
    is_chat: bool

    def document(self, kind: str, **fields: Any) -> Document:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, **fields,
        }  # fmt: skip


def usage(prompt_tokens: int, completion_tokens: int) -> Document:
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }  # fmt: skip


class WholeChoice:
    """The pieces of one choice, put together."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.scored: list[Scored] = []
        self.calls: list[CalledTool] = []
        self.finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.scored.extend(piece.scored)
        self.calls.extend(piece.tool_calls)
        self.finish_reason = piece.finish_reason or self.finish_reason


def whole(
    head: Head, choices: Sequence[WholeChoice], counts: Document, *, is_scored: bool
) -> Document:
    """The document of an answer that was not streamed."""
    entries = []
    for index, choice in enumerate(choices):
        text = "".join(choice.text)
        entry: Document = {"index": index, "finish_reason": choice.finish_reason}
        if head.is_chat:
            message: Document = {"role": "assistant", "content": text, "refusal": None}
            if choice.calls:
                message["content"] = text or None
                message["tool_calls"] = [_call(call) for call in choice.calls]
            entry["message"] = message
            entry["logprobs"] = _chat_logprobs(choice.scored) if is_scored else None
        else:
            entry["text"] = text
            entry["logprobs"] = _text_logprobs(choice.scored, 0) if is_scored else None
        entries.append(entry)
    kind = "chat.completion" if head.is_chat else "text_completion"
    return head.document(kind, choices=entries, usage=counts)


class Chunks:
    """The chunks of a streamed answer, in order."""

    def __init__(self, head: Head, *, is_scored: bool, with_usage: bool) -> None:
        self.with_usage = with_usage
        self._head = head
        self._is_scored = is_scored
        self._more: Document = {"usage": None} if with_usage else {}
        self._offsets: dict[int, int] = {}  # completions: characters sent of each choice
        self._kind = "chat.completion.chunk" if head.is_chat else "text_completion"

    def first(self, num_choices: int) -> list[Document]:
        """A chat begins by saying who speaks."""
        if not self._head.is_chat:
            return []
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, {"delta": delta}, None, None) for index in range(num_choices)]

    def of(self, pieces: Iterable[Piece]) -> list[Document]:
        return [self._chat(piece) if self._head.is_chat else self._text(piece) for piece in pieces]

    def last(self, counts: Document) -> Document:
        """The chunk that carries the usage."""
        return self._head.document(self._kind, choices=[], usage=counts)

    def _chat(self, piece: Piece) -> Document:
        delta: Document = {"content": piece.text} if piece.text else {}
        if piece.tool_calls:
            delta["tool_calls"] = [{"index": c.place, **_call(c)} for c in piece.tool_calls]
        logprobs = _chat_logprobs(piece.scored) if self._is_scored and piece.scored else None
        return self._chunk(piece.index, {"delta": delta}, piece.finish_reason, logprobs)

    def _text(self, piece: Piece) -> Document:
        offset = self._offsets.get(piece.index, 0)
        self._offsets[piece.index] = offset + len(piece.text)
        logprobs = _text_logprobs(piece.scored, offset) if self._is_scored else None
        return self._chunk(piece.index, {"text": piece.text}, piece.finish_reason, logprobs)

    def _chunk(
        self, index: int, content: Document, reason: FinishReason | None, logprobs: Any
    ) -> Document:
        choice = {"index": index, **content, "finish_reason": reason, "logprobs": logprobs}
        return self._head.document(self._kind, choices=[choice], **self._more)


def model_card(name: str, created: int, root: str, *, is_chat: bool) -> Document:
    """An entry of /v1/models; `root` is the model an adapter belongs to, or the model itself.
    `chat`, ours: whether it was tuned to answer."""
    return {
        "id": name, "object": "model", "created": created, "owned_by": "solollm", "root": root,
        "chat": is_chat,
    }  # fmt: skip


def _call(call: CalledTool) -> Document:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _chat_logprobs(scored: Sequence[Scored]) -> Document:
    def entry(content: bytes, logprob: float) -> Document:
        text = content.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(content)}

    content = [
        {**entry(s.content, s.logprob), "top_logprobs": [entry(*pair) for pair in s.alternatives]}
        for s in scored
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(scored: Sequence[Scored], offset: int) -> Document:
    tokens = [s.content.decode("utf-8", "replace") for s in scored]
    offsets, place = [], offset
    for token in tokens:
        offsets.append(place)
        place += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [s.logprob for s in scored],
        "top_logprobs": [
            {content.decode("utf-8", "replace"): value for content, value in s.alternatives}
            for s in scored
        ],
        "text_offset": offsets,
    }  # fmt: skip
