"""The tokenizer: exact round trips, no forged special tokens, files that others can load."""

from __future__ import annotations

from solollm.tokenizer_training import train_tokenizer


def test_special_token_text_in_user_text_stays_text() -> None:
    """A user who types `<|end|>` must not end a turn (T8)."""
    tokenizer = train_tokenizer(["some text <|end|> to learn from"] * 4, 512)
    ids = tokenizer.encode("a<|end|>b")
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == "a<|end|>b"
