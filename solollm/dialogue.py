"""A conversation with a model: what is remembered, and how each turn is put to it.

A chat-tuned model gets the turns in its chat template. A base model has learned only to continue
text, so its conversation is one growing document. The terminal is `solollm.commands.chat`'s, a
model behind a server `solollm.remote_dialogue`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import replace
from typing import Literal

from solollm.backend import Request, SamplingParams
from solollm.completion import DEFAULT_NEW_TOKENS, DEFAULT_SAMPLING, TextModel, decoded
from solollm.errors import ConfigError
from solollm.generation import stream_from

Mode = Literal["auto", "chat", "completion"]


class Dialogue(ABC):
    """One conversation, wherever its model is.

    Attributes:
        mode: "chat" or "completion"; "auto" takes what the model was tuned for.
        messages: in chat mode, the turns so far ({"role", "content"}), a system prompt first.
        text: in completion mode, the document so far.
    """

    def __init__(
        self, mode: Mode, *, is_chat: bool, sampling: SamplingParams, max_new_tokens: int
    ) -> None:
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        if mode == "auto":
            mode = "chat" if is_chat else "completion"
        self.mode: Literal["chat", "completion"] = mode
        self.messages: list[dict[str, str]] = []
        self.text = ""
        self._system = ""

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.text = ""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def set_system(self, text: str) -> None:
        """Begin anew under another system prompt (empty: under none)."""
        if self.mode == "completion":
            raise ConfigError(
                "a system prompt means nothing to a model that continues text",
                fix="write it into the text itself, or force --chat",
            )
        self._system = text
        self.reset()

    @abstractmethod
    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer to one more turn, piece by piece.

        Closing the iterator stops the answer; what was given out so far is remembered as the whole
        of it. Old turns are dropped from the beginning when the context is full.

        Raises:
            ConfigError: an empty turn, or one that alone does not fit.
        """

    def _remember(self, answer: str) -> None:
        if self.mode == "chat":
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.text += answer
        # The next turn draws from other random numbers, even when it is the same text.
        self._sampling = replace(self._sampling, seed=self._sampling.seed + 1)

    def _document(self, text: str) -> str:
        """The document, with one more turn."""
        return f"{self.text}\n{text}" if self.text else text

    @staticmethod
    def _require_text(text: str) -> None:
        if not text.strip():
            raise ConfigError("the message is empty", fix="type something")


class ChatSession(Dialogue):
    """A conversation with a model that is opened here."""

    def __init__(
        self,
        model: TextModel,
        *,
        mode: Mode = "auto",
        system: str = "",
        sampling: SamplingParams = DEFAULT_SAMPLING,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
    ) -> None:
        """Raises ConfigError where the chat mode is asked of a tokenizer without a template, or a
        system prompt of a model that only continues text."""
        super().__init__(
            mode, is_chat=model.is_chat, sampling=sampling, max_new_tokens=max_new_tokens
        )
        if self.mode == "chat":
            _ = model.tokenizer.chat_template  # raises where there is none
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {max_new_tokens} leaves no room for an answer")
        self._model = model
        # One decoder for the whole conversation: it keeps what it computed for earlier turns.
        self._decoder = model.engine.open()
        if system:
            self.set_system(system)

    def ask(self, text: str) -> Generator[str, None, None]:
        self._require_text(text)
        prompt = self._chat_prompt(text) if self.mode == "chat" else self._document_prompt(text)
        request = Request(prompt, self._max_new_tokens, self._sampling, self._model.stop_ids)
        return self._answer(request)

    def _answer(self, request: Request) -> Generator[str, None, None]:
        pieces: list[str] = []
        events = stream_from(self._decoder, request)
        try:
            for piece, _ in decoded(self._model.tokenizer, events):
                pieces.append(piece)
                if piece:
                    yield piece
        finally:
            events.close()
            self._remember("".join(pieces))

    @property
    def _room(self) -> int:
        """Prompt tokens that leave the answer at least half of its tokens, or of the context."""
        limit = self._model.max_seq_len
        return limit - min(self._max_new_tokens, limit) // 2

    def _chat_prompt(self, text: str) -> list[int]:
        turns = [*self.messages, {"role": "user", "content": text}]
        first = 1 if self._system else 0
        while True:
            prompt = self._model.tokenizer.apply_chat_template(turns)
            if len(prompt) <= self._room or len(turns) <= first + 1:
                break
            del turns[first : first + 2]  # the oldest question and its answer
        if len(prompt) > self._room:
            raise ConfigError(
                f"this message makes a prompt of {len(prompt)} tokens",
                why=f"the model's context leaves {self._room} for it",
                fix="shorten it, or the system prompt",
            )
        self.messages = turns
        return prompt

    def _document_prompt(self, text: str) -> list[int]:
        tokenizer = self._model.tokenizer
        document = self._document(text)
        ids = tokenizer.encode(document)
        self.text = document
        return [tokenizer.bos_id, *ids[-(self._room - 1) :]]
