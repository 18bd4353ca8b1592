"""The models a server offers, by the names that clients ask for. No other name leads anywhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solollm.errors import nearest
from solollm.serving.api_errors import ApiError
from solollm.serving.token_engine import TokenEngine
from solollm.serving.tool_calls import ToolStyle
from solollm.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A name with what answers under it.

    Attributes:
        root: the base model's name; its own where it is no adapter.
        adapter: the engine's name of the adapter, or None.
        checkpoint: the folder it was read from.
        is_chat: tuned to answer rather than to continue.
        tools: how it writes tool calls; None where it was not tuned to.
    """

    name: str
    root: str
    engine: TokenEngine
    tokenizer: Tokenizer
    checkpoint: Path
    stop_ids: frozenset[int]
    is_chat: bool
    tools: ToolStyle | None = None
    adapter: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def encode(self, text: str) -> list[int]:
        """Token ids; one thread at a time, because a tokenizer remembers words."""
        with self._lock:
            return self.tokenizer.encode(text)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        with self._lock:
            return self.tokenizer.encode_chat(messages, True, tools=tools)[0]


class Catalogue:
    """Names to models, in the order in which they were given; the first is the default of pages."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}
        assert len(self._models) == len(models), "two models of one name"

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @property
    def engines(self) -> dict[str, TokenEngine]:
        """Each engine once, by its base model's name."""
        return {model.root: model.engine for model in self._models.values()}

    def find(self, name: str) -> ServedModel:
        """Raises ApiError 404 for a name that is not offered, be it a path or an address."""
        model = self._models.get(name)
        if model is None:
            hint = nearest(name, self._models) or f"offered: {', '.join(self._models)}"
            raise ApiError(
                404, f"The model {name[:100]!r} does not exist here; {hint}",
                code="model_not_found", param="model",
            )  # fmt: skip
        return model
