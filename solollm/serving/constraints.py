"""Constrained decoding: which tokens may come next, by llguidance over our own token table.

A schema, a regular expression or a grammar becomes a matcher with bounded work per step; its mask
is laid over the logits of one request. llguidance was taken because it is one small library without
a framework, and computes masks as they are needed instead of compiling whole vocabularies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from solollm.serving.token_engine import Constraint
from solollm.tokenizer import Tokenizer

_ANY_OBJECT = '{"type":"object"}'


class ConstraintError(Exception):
    """The constraint cannot be used; the message says why."""


class ConstraintMaker:
    """Makes matchers for one tokenizer. Safe to call from any thread; making one may take long."""

    def __init__(self, tokenizer: Tokenizer, num_logits: int, stop_ids: Sequence[int]) -> None:
        """`num_logits`: length of a row of logits; `stop_ids`: what may end a finished match."""
        self._tokenizer = tokenizer
        self._num_logits = num_logits
        self._stop_ids = [i for i in stop_ids if i < tokenizer.vocab_size]
        self._table: Any = None  # llguidance's tokenizer, made when the first constraint comes

    def make(self, constraint: Constraint) -> ConstraintMask:
        """The mask of a constraint at its beginning.

        Raises:
            ConstraintError: a schema, expression or grammar that is malformed, unsupported or too
                large.
        """
        import llguidance

        try:
            matcher = llguidance.LLMatcher(
                self._llguidance_tokenizer(), _grammar(constraint), log_level=0,
                limits=llguidance.LLParserLimits(verbose_errors=False),
            )  # fmt: skip
        except ValueError as error:
            raise ConstraintError(str(error)) from error
        if matcher.is_error():
            raise ConstraintError(_first_line(matcher.get_error()))
        return ConstraintMask(matcher, self._num_logits)

    def _llguidance_tokenizer(self) -> Any:
        import llguidance

        if self._table is None:
            self._table = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(_TokenTable(self._tokenizer)),
                n_vocab=self._tokenizer.vocab_size, eos_token=self._stop_ids,
            )  # fmt: skip
        return self._table


class ConstraintMask:
    """A logits processor that lets only matching tokens through.

    It never raises, because a raise would stop the requests beside this one: `error` says what went
    wrong, and the logits then pass unchanged.
    """

    def __init__(self, matcher: Any, num_logits: int) -> None:
        self.error = ""
        self._matcher = matcher
        self._num_logits = num_logits
        self._num_seen = -1  # tokens of the sequence that the matcher knows; -1: not begun

    def __call__(self, ids: Sequence[int], logits: np.ndarray) -> np.ndarray:
        if self.error:
            return logits
        if self._num_seen >= 0 and not self._matcher.consume_tokens(list(ids[self._num_seen :])):
            self.error = _first_line(self._matcher.get_error()) or "a token outside the grammar"
            return logits
        self._num_seen = len(ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            self.error = _first_line(self._matcher.get_error())
            return logits
        allowed = np.unpackbits(bits, bitorder="little")[: self._num_logits].astype(bool)
        if not allowed.any():
            self.error = "no token can continue the text"
            return logits
        masked = np.full_like(logits, -np.inf)
        masked[: len(allowed)][allowed] = logits[: len(allowed)][allowed]
        return masked


class _TokenTable:
    """A tokenizer as llguidance's wrapper wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(plain)


def _grammar(constraint: Constraint) -> str:
    import llguidance

    make = llguidance.LLMatcher
    if constraint.kind == "regex":
        return make.grammar_from_regex(constraint.source)
    if constraint.kind == "grammar":
        return make.grammar_from_lark(constraint.source)
    # Compact JSON: with free white space a small model may write blanks until its tokens are spent.
    options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = json.loads(constraint.source or _ANY_OBJECT)
    return make.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else ""
