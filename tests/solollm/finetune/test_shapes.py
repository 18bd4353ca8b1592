"""Rows become conversations, or a problem that says why."""

from __future__ import annotations

from typing import Any

import pytest

from solollm.finetune.shapes import MAX_MESSAGE_CHARS, BadRow, conversation, detect

USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}
PLAIN = [USER, ANSWER]


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": PLAIN}, "messages"),
        ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."}]},
         "sharegpt"),
        ({"instruction": "why?", "input": "", "output": "so."}, "alpaca"),
        ({"prompt": "why?", "completion": "so."}, "prompt_completion"),
        ({"question": "why?", "answer": "so."}, "prompt_completion"),
        ({"prompt": "why?", "response": "so.", "id": 3}, "prompt_completion"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "why?"}]}, ANSWER]},
         "messages"),
    ],
)  # fmt: skip
def test_common_shapes_mean_the_same_conversation(row: dict[str, Any], shape: str) -> None:
    """Guards: a shape taken for another, a question lost on the way."""
    assert detect(row) == shape
    assert conversation(row, shape).messages == PLAIN  # type: ignore[arg-type]


def test_an_alpaca_input_follows_its_instruction() -> None:
    """Guards: the input that half of Alpaca's rows have, dropped."""
    row = {"instruction": "add", "input": "1, 2", "output": "3"}
    assert conversation(row, "alpaca").messages[0]["content"] == "add\n\n1, 2"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "why?", "chosen": "so.", "rejected": "no."},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no."}]},
        {"chosen": PLAIN, "rejected": [USER, {**ANSWER, "content": "no."}]},
    ],
)
def test_preference_pairs_share_all_but_the_last_turn(row: dict[str, Any]) -> None:
    """Guards: chosen and rejected swapped, or a prompt doubled."""
    assert detect(row) == "preference"
    found = conversation(row, "preference", system="be brief")
    assert [m["content"] for m in found.messages] == ["be brief", "why?", "so."]
    assert [m["content"] for m in found.rejected] == ["be brief", "why?", "no."]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"content": "why?"}, ANSWER], "message 1 has no `role`"),
        ([USER, {"role": "assistant"}], "message 2 has no `content`"),
        ([USER, {**ANSWER, "content": " \n"}], "message 2, the assistant's, is empty"),
        ([{**USER, "role": "usr"}, ANSWER], "unknown 'usr'; did you mean `user`"),
        ([{**USER, "role": 3}, ANSWER], "`role` of message 1 is a number"),
        ([{**USER, "content": 5}, ANSWER], "content of message 1 is a number, not text"),
        ([{**USER, "content": "x" * (MAX_MESSAGE_CHARS + 1)}, ANSWER], "250,001 characters"),
        ([{**USER, "content": "\ud800"}, ANSWER], "lone surrogate"),
        ([USER], "nobody answers"),
        ([USER, USER, ANSWER], "both the user's"),
        ([ANSWER], "no user's turn"),
        ([USER, ANSWER, {"role": "system", "content": "be good"}], "in the middle"),
        ([], "an empty list"),
        ("why?", "text, not a list"),
        (["why?"], "message 1 is text"),
    ],
)
def test_a_bad_row_says_why(messages: Any, reason: str) -> None:
    """Guards: a turn trained on that is nobody's, empty, or cut by the tokenizer."""
    with pytest.raises(BadRow, match=reason):
        conversation({"messages": messages}, "messages")


@pytest.mark.parametrize(
    ("row", "shape", "reason"),
    [
        ({"prompt": "a"}, "prompt_completion", "no prompt with its completion; it has prompt"),
        ({"instruction": "a", "output": None}, "alpaca", "its `output` is null"),
        ({"instruction": 1, "output": "b"}, "alpaca", "`instruction` is a number"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            "sharegpt",
            "`from` of message 1 is the unknown 'bot'",
        ),
        ({"chosen": PLAIN, "rejected": [{**USER, "content": "?"}, ANSWER]}, "preference", "differ"),
    ],
)  # fmt: skip
def test_a_row_of_another_shape_says_why(row: Any, shape: Any, reason: str) -> None:
    """Guards: a half-filled column read as text."""
    with pytest.raises(BadRow, match=reason):
        conversation(row, shape)
    assert detect({"text": "plain"}) is None
