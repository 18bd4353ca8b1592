"""From tokens to what a reader sees: text in whole characters, log-probabilities, endings.

`Answer` runs the jobs of one request and yields `Piece`s; a streamed and a whole answer are made of
the same pieces. Per choice: token ids -> characters -> stop strings and filters -> tool calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from solollm.serving.text_filter import FilterChain, TextFilter
from solollm.serving.token_engine import Token, TokenStream
from solollm.serving.tool_calls import CalledTool, ToolParser
from solollm.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "content_filter", "tool_calls"]


class Scored(NamedTuple):
    """A token with its log-probability and the likeliest at its place, as bytes."""

    content: bytes
    logprob: float
    alternatives: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Piece:
    """What one choice adds. `text` may be empty where it ends or calls a tool."""

    index: int
    text: str
    scored: tuple[Scored, ...] = ()
    tool_calls: tuple[CalledTool, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass
class Timing:
    """Seconds since the request came: of each batch of tokens, as they were handed out."""

    started: float = field(default_factory=time.monotonic)
    moments: list[tuple[float, int]] = field(default_factory=list)  # (seconds, tokens)

    def note(self, count: int) -> None:
        self.moments.append((time.monotonic() - self.started, count))


class ChoiceText:
    """One choice: tokens in, pieces out.

    Args:
        filters: stop strings first.
        is_scored: whether pieces carry log-probabilities (only with stop strings as filters).
        parser: reads tool calls out of the text; None where no tools were given.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        filters: Sequence[TextFilter],
        *,
        is_scored: bool,
        parser: ToolParser | None = None,
    ) -> None:
        self.num_tokens = 0
        self._index = index
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream(skip_special=parser is None)
        self._filters = FilterChain(filters)
        self.is_slow = any(item.is_slow for item in filters)
        self._is_scored = is_scored
        self._parser = parser
        self._num_decoded = self._num_shown = 0  # characters
        self._scored: list[tuple[int, Scored]] = []  # (where its text begins, token), not yet shown

    def push(self, token: Token) -> Piece | None:
        """The piece that a token completes; None where it shows nothing yet."""
        self.num_tokens += token.id >= 0
        text = ""
        if token.id >= 0 and token.finish_reason != "stop":  # the stop id is no text
            if self._is_scored:
                self._scored.append((self._num_decoded, self._score(token)))
            text = self._decoder.push(token.id)
        if token.finish_reason is not None:
            text += self._decoder.finish()
        self._num_decoded += len(text)
        shown = self._filters.push(text)
        reason: FinishReason | None = self._filters.stopped or token.finish_reason
        if token.finish_reason is not None and self._filters.stopped is None:
            shown += self._filters.finish()
            reason = self._filters.stopped or token.finish_reason
        return self._piece(shown, reason)

    def _piece(self, shown: str, reason: FinishReason | None) -> Piece | None:
        self._num_shown += len(shown)
        calls: tuple[CalledTool, ...] = ()
        if self._parser is not None:
            shown, calls = self._parser.push(shown, is_last=reason is not None)
            if reason == "stop" and self._parser.num_calls:
                reason = "tool_calls"
        if not (shown or calls or reason):
            return None
        end = self._num_shown if reason == "stop" else self._num_decoded
        ready = tuple(scored for start, scored in self._scored if start < max(end, 1))
        self._scored.clear()
        return Piece(self._index, shown, ready, calls, reason)

    def _score(self, token: Token) -> Scored:
        content = self._tokenizer.token_bytes
        others = tuple((content(i), value) for i, value in token.alternatives)
        return Scored(content(token.id), token.logprob, others)


class Answer:
    """The choices of one request, while its jobs run. Iterate `pieces` once; then the counts hold.

    Attributes:
        completion_tokens: new tokens so far, over all choices.
    """

    def __init__(self, stream: TokenStream, choices: Sequence[ChoiceText], timing: Timing) -> None:
        self._stream = stream
        self._choices = choices
        self._timing = timing
        self._ended: set[int] = set()

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What each batch of tokens adds. Raises what `TokenStream.next` raises."""
        while len(self._ended) < len(self._choices):
            tokens = await self._stream.next()
            if not tokens:
                return
            self._timing.note(len(tokens))
            pieces = []
            for index, token in tokens:
                if index in self._ended:
                    continue
                choice = self._choices[index]
                if choice.is_slow:
                    piece = await asyncio.to_thread(choice.push, token)
                else:
                    piece = choice.push(token)
                if piece is not None:
                    pieces.append(piece)
                    self._end(piece, token)
            if pieces:
                yield pieces

    def _end(self, piece: Piece, token: Token) -> None:
        if piece.finish_reason is None:
            return
        self._ended.add(piece.index)
        if token.finish_reason is None:  # a stop string or a filter ended it, not the engine
            self._stream.cancel(piece.index)
