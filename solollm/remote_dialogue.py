"""A conversation with a model behind a server that speaks OpenAI's API, this project's or any.

The turns are the client's to remember, as in `solollm.dialogue`; the server lays them out and
answers. The terminal is `solollm.commands.chat`'s.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from solollm.backend import SamplingParams
from solollm.completion import DEFAULT_NEW_TOKENS, DEFAULT_SAMPLING
from solollm.dialogue import Dialogue, Mode
from solollm.errors import BackendError, ConfigError, nearest

_CONNECT_SECONDS = 10.0
_TOO_LONG = "context_length_exceeded"


class RemoteModel:
    """One model of a server, found by its name.

    Attributes:
        name: as the server lists it.
        is_chat: tuned to answer; a server that does not say so is taken at its word for chats.
    """

    def __init__(self, url: str, *, name: str = "", key: str = "") -> None:
        """`url`: `http://host:port`, with or without `/v1`; no `name`: the first that is offered.

        Raises:
            ConfigError: no address, a name that is not offered, a key that is refused.
            BackendError: nothing answers there, or nothing that speaks OpenAI's API.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                f"{url!r} is no address of a server", fix="for example --url http://127.0.0.1:8000"
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        # No time limit for reading: a large model may think for minutes, and Ctrl-C ends it.
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
        )
        try:
            card = self._card(name)
        except BaseException:
            self.close()
            raise
        self.name: str = card["id"]
        self.is_chat = card.get("chat") is not False

    def close(self) -> None:
        self._client.close()

    def stream(self, route: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of one streamed answer.

        Raises:
            TurnRefused: the server does not take this request.
            BackendError: it is gone, or its answer broke off.
        """
        asked = {"model": self.name, "stream": True, **body}
        with self._reached(), self._client.stream("POST", route, json=asked) as answer:
            if answer.status_code != 200:
                raise TurnRefused.of(answer.status_code, answer.read())
            for line in answer.iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if not data or data == "[DONE]":
                    continue
                event = _table(data)
                if "error" in event:
                    raise BackendError(f"the answer broke off: {_message(event)}")
                yield event

    def _card(self, name: str) -> dict[str, Any]:
        cards = self._cards()
        card = next((card for card in cards if card["id"] == (name or card["id"])), None)
        if card is None:
            offered = [card["id"] for card in cards]
            raise ConfigError(
                f"{self.url} offers no model {name!r}",
                why=nearest(name, offered) or f"offered: {', '.join(offered)}",
            )
        return card

    def _cards(self) -> list[dict[str, Any]]:
        with self._reached():
            answer = self._client.get("/v1/models")
        if answer.status_code in (401, 403):
            refusal = TurnRefused.of(answer.status_code, answer.content)
            raise ConfigError(
                f"{self.url} refuses this key", why=refusal.what,
                fix="give its key: --key-file FILE, or SOLOLLM_API_KEY",
            )  # fmt: skip
        if answer.status_code != 200:
            raise TurnRefused.of(answer.status_code, answer.content)
        cards = _table(answer.content).get("data")
        listed = cards if isinstance(cards, list) else []
        named = [c for c in listed if isinstance(c, dict) and isinstance(c.get("id"), str)]
        if not named:
            raise BackendError(
                f"{self.url} does not answer like a server of models",
                why="GET /v1/models lists none", fix="give the address of an OpenAI-like server",
            )  # fmt: skip
        return named

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BackendError(
                f"nothing answers at {self.url}",
                why=f"{type(error).__name__}: {error}",
                fix="start a server there (solollm serve RUN), or give another --url",
            ) from error


class TurnRefused(ConfigError):
    """What the server says of a request that it does not take. `code`: OpenAI's word for it."""

    code = ""

    @classmethod
    def of(cls, status: int, content: bytes) -> TurnRefused:
        try:
            table = _table(content)
        except BackendError:
            table = {}
        refused = cls(_message(table) or f"the server answered with status {status}")
        found = table.get("error")
        refused.code = str(found.get("code", "")) if isinstance(found, dict) else ""
        return refused


class RemoteSession(Dialogue):
    """One conversation with a `RemoteModel`. A turn that the server finds too long costs the oldest
    ones, as in a local conversation."""

    def __init__(
        self,
        model: RemoteModel,
        *,
        mode: Mode = "auto",
        system: str = "",
        sampling: SamplingParams = DEFAULT_SAMPLING,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
    ) -> None:
        """Raises ConfigError for a system prompt of a model that only continues text."""
        super().__init__(
            mode, is_chat=model.is_chat, sampling=sampling, max_new_tokens=max_new_tokens
        )
        self._model = model
        if system:
            self.set_system(system)

    def ask(self, text: str) -> Generator[str, None, None]:
        """As `Dialogue.ask`; of a turn that the server does not take nothing is remembered.

        Raises:
            ConfigError: an empty turn, or one that the server refuses.
            BackendError: the server is gone, or its answer broke off.
        """
        self._require_text(text)
        return self._answer(text)

    def _answer(self, text: str) -> Generator[str, None, None]:
        pieces: list[str] = []
        events = self._events(text)
        try:
            for event in events:
                if piece := _text_of(event):
                    pieces.append(piece)
                    yield piece
        except TurnRefused:
            raise
        except BaseException:
            self._accept(text, pieces)
            raise
        else:
            self._accept(text, pieces)
        finally:
            events.close()

    def _accept(self, text: str, pieces: list[str]) -> None:
        """Remember a turn and what came of its answer."""
        if self.mode == "chat":
            self.messages.append({"role": "user", "content": text})
        else:
            self.text = self._document(text)
        self._remember("".join(pieces))

    def _events(self, text: str) -> Generator[dict[str, Any], None, None]:
        """The answer's events, asked for with as much of the conversation as the server takes."""
        while True:
            try:
                yield from self._model.stream(*self._request(text))
                return
            except TurnRefused as refused:
                if refused.code != _TOO_LONG or not self._forget_oldest():
                    raise

    def _request(self, text: str) -> tuple[str, dict[str, Any]]:
        body = _sampling_fields(self._sampling, self._max_new_tokens)
        if self.mode == "chat":
            turns = [*self.messages, {"role": "user", "content": text}]
            return "/v1/chat/completions", {"messages": turns, **body}
        return "/v1/completions", {"prompt": self._document(text), **body}

    def _forget_oldest(self) -> bool:
        """Drop the oldest question and answer, or half of the document; False: nothing is left."""
        if self.mode == "completion":
            left, self.text = bool(self.text), self.text[len(self.text) // 2 + 1 :]
            return left
        first = 1 if self._system else 0
        left = len(self.messages) > first
        del self.messages[first : first + 2]
        return left


def _sampling_fields(sampling: SamplingParams, max_new_tokens: int) -> dict[str, Any]:
    """OpenAI's fields, and those that only some servers know where they are asked for."""
    fields = {
        "max_tokens": max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "seed": sampling.seed,
    }  # fmt: skip
    more = {
        "top_k": (sampling.top_k, 0), "min_p": (sampling.min_p, 0.0),
        "repetition_penalty": (sampling.repetition_penalty, 1.0),
    }  # fmt: skip
    return fields | {name: value for name, (value, off) in more.items() if value != off}


def _text_of(event: Mapping[str, Any]) -> str:
    """The new characters of a chunk of either route; "" for one without any."""
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return ""
    delta = choices[0].get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choices[0].get("text")
    return text if isinstance(text, str) else ""


def _table(content: str | bytes) -> dict[str, Any]:
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BackendError(
            "the server does not answer in JSON", why=f"it sent {content[:80]!r}",
            fix="give the address of an OpenAI-like server: --url",
        ) from error  # fmt: skip
    return table if isinstance(table, dict) else {}


def _message(table: Mapping[str, Any]) -> str:
    error = table.get("error")
    told = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(told).split())[:300] if told else ""
