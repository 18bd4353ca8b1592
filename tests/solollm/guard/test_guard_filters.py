"""The guard's filters: what they let through, and that it never depends on how the text streams."""

from __future__ import annotations

import random
import time

import pytest

from solollm.errors import ConfigError
from solollm.guard.distress import HELP
from solollm.guard.guard import Guard
from solollm.guard.measurement import texts_of
from solollm.guard.notices import Notices
from solollm.guard.personal_filter import PersonalData
from solollm.guard.sample_texts import DEVELOP, HELD_OUT
from solollm.guard.settings import GuardSettings, RepetitionTable, Rule
from solollm.serving.text_filter import FilterChain, FilterContext, let_through

RULES = (
    Rule(name="project", words=("project bluebird", "bluebird", "青い鳥"), replacement="[project]"),
    Rule(name="ticket", pattern=r"\bT-\d+", max_chars=12, replacement="[ticket]"),
    Rule(name="end", pattern=r"(?:stop|halt) ?here", action="block", message="(ended)"),
    Rule(name="noted", words=("maybe",), action="warn"),
)
PIECES = (
    "mira.novak@kestrel.io", "+44 20 7946 0958", "call 030 1234567", "4111 1111 1111 1111",
    "DE89 3704 0044 0532 0130 00", "GB29 NWBK 6016 1331 9268 19", "219-45-6789", "AB 12 34 56 C",
    "sk-aB3dE5gH7jK9mN1pQ3sT5vX7", "-----BEGIN RSA PRIVATE KEY-----\nMIIx\nabc\n"
    "-----END RSA PRIVATE KEY-----", "-----BEGIN", "---", "api_key = 'x7Kp2mQ9vT4wZ8nB3cD5'",
    "Project\n Bluebird", "bluebirds", "青い鳥が", "T-12345", "T-1234567890123456", "T-", "maybe",
    "stop here", " ", "\n", ", ", ". ", "(", "1", "12 34 ", "word ", "Ein Satz. ", "+", "é", "😀",
    "x" * 30, "é" * 511, "x1@" * 171, f"eyJ{'a1b2' * 9}.eyJ{'a1b2-cdefg' * 60}",
    "https://a.b/c?d=e ", "1. the same line of some words\n", "| a | b |\n",
)  # fmt: skip


def told(guard: Guard, pieces: list[str], message: str = "hello") -> tuple[str, str | None]:
    chain = FilterChain(guard(FilterContext([{"role": "user", "content": message}], True)))
    return let_through(chain, pieces)


def cut(text: str, rng: random.Random) -> list[str]:
    size = rng.choice((1, 2, 5, 20, 100))
    pieces = []
    while text:
        count = rng.randint(1, size)
        pieces.append(text[:count])
        text = text[count:]
    return pieces


def test_a_thousand_random_cuts_change_nothing() -> None:
    """A find missed because it came in two tokens, text lost or shown twice at a cut, a mask that
    was already half shown."""
    rng = random.Random(20)
    guard = Guard(GuardSettings(rules=RULES), notices=Notices(is_silent=True))
    ends = {"masked": 0, "ended": 0}
    for number in range(100):
        parts = rng.choices(PIECES, k=rng.randint(1, 25))
        text = "".join(part + rng.choice(("", " ", " ")) for part in parts)
        if number % 10 == 0:
            text += rng.choice(("so it goes on and on. ", "=", "one line of words again\n")) * 60
        whole = told(guard, [text])
        ends["masked"] += whole[0] != text
        ends["ended"] += whole[1] is not None
        for _ in range(10):
            pieces = cut(text, rng)
            assert told(guard, pieces) == whole, pieces
    assert ends["masked"] > 50
    assert 10 < ends["ended"] < 90


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("Write to mira.novak@kestrel.io.", "Write to [email]."),
        ("<Mira@Kestrel.io>;", "<[email]>;"),
        ("mail user@example.com or git@github.com:x/y", None),
        ("A@B.T and x@W.transpose(0)", None),
        ("Dial +44 20 7946 0958 now", "Dial [phone number] now"),
        ("(212) 736-5000", "[phone number]"),
        ("212-555-0142 is from a film", None),
        ("on 2024-01-15T10:00:00+00:00 at 10.20.30.40", None),
        ("tel 030 1234567 and seed 030 1234567", "tel [phone number] and seed [phone number]"),
        ("4111 1111 1111 1111", None),  # everybody's test card: two digits only
        ("4539 1488 0343 6467", "[card number]"),
        ("4539 1488 0343 6468", None),
        ("to DE89 3704 0044 0532 0130 00 today", "to [bank account] today"),
        ("to DE88 3704 0044 0532 0130 00 today", None),
        ("SSN 219-45-6789", "SSN [ID number]"),
        ("000-45-6789 and 12-345-6789", None),
        ("key sk-aB3dE5gH7jK9mN1pQ3sT5vX7!", "key [key]!"),
        ("api_key=YOUR_API_KEY_GOES_HERE", None),
        ("commit 9f8e7d6c5b4a39281706f5e4d3c2b1a098765432", None),
        ("-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----\nbye", "[private key]\nbye"),
        ("-----BEGIN PRIVATE KEY-----\nabc", "[private key]"),
        ("-----BEGIN CERTIFICATE-----\nabc", None),
        ("请联系mira@kestrel.io谢谢", "请联系[email]谢谢"),
        (f"(eyJ0eXAi{'x1' * 9}.eyJzdWIi{'Yz4' * 300}.{'q9_' * 60}) ok", "([key] ok"),
    ],
)  # fmt: skip
def test_personal_data_is_masked_and_nothing_else(said: str, shown: str | None) -> None:
    """A leak, or an ordinary number that is hidden; a mask that eats its neighbours."""
    data = PersonalData(Notices(is_silent=True))
    assert data.push(said) + data.finish() == (said if shown is None else shown)


def test_text_without_spaces_streams() -> None:
    """Chinese that came a thousand characters at a time, because no word of it seemed to end."""
    data = PersonalData(Notices(is_silent=True))
    assert data.push("今天天气很好。我们去公园。") == "今天天气很好。我们去公园。"


def test_what_the_conversation_holds_is_no_leak() -> None:
    """A user who asks for a letter to somebody and gets `[email]` in it."""
    guard = Guard()
    message = "Put +1 (212) 736-5000 and Mira@kestrel.io into a letter"
    answer = "Reach us: mira@kestrel.io, +1 212-736-5000, or joe@kestrel.io"
    assert told(guard, [answer], message)[0].endswith(
        "mira@kestrel.io, +1 212-736-5000, or [email]"
    )
    strict = Guard(GuardSettings.model_validate({"personal": {"known_is_shown": False}}))
    assert told(strict, [answer], message)[0] == "Reach us: [email], [phone number], or [email]"


def test_actions(caplog: pytest.LogCaptureFixture) -> None:
    """An answer that goes on after `block`, a text changed by `warn`, or a log that holds it."""
    text = "Ask joe@kestrel.io about it"
    warned = Guard(GuardSettings.model_validate({"personal": {"action": "warn"}}))
    assert told(warned, [text]) == (text, None)
    assert warned.notices.counts == {("personal data", "email", "warn"): 1}
    assert "kestrel" not in caplog.text
    assert "personal data, email: warn" in caplog.text
    blocked = Guard(GuardSettings.model_validate({"personal": {"action": "block"}}))
    assert told(blocked, [text]) == ("Ask ", "content_filter")


def test_loops_are_ended_and_repetition_that_means_something_is_not() -> None:
    """A model that writes one sentence until its token limit; a table that is cut off."""
    guard = Guard()
    shown, reason = told(guard, ["Well. " + "I like the sea. " * 200])
    assert reason == "content_filter"
    assert len(shown) < 300
    assert told(guard, ["ab " * 1000])[1] == "content_filter"
    counted = "".join(f"{n}. The book is on the table here\n" for n in range(1, 50))
    assert told(guard, [counted])[1] == "content_filter"
    harmless = "=" * 79 + "\n" + "| x | 0 | 0 |\n" * 12 + "0, " * 60 + "\nNo. " * 10
    assert told(guard, [harmless]) == (harmless, None)


def test_somebody_in_danger_gets_the_help_lines() -> None:
    """A small model's advice to somebody who wants to die; help lines for a Linux question."""
    guard = Guard()
    assert told(guard, ["Sure, first"], "I want to end my life") == (HELP, "content_filter")
    assert told(guard, ["Use kill"], "How do I kill a process?") == ("Use kill", None)
    table = {"message": "Call 143.", "phrases": ["ich mag nicht mehr"]}
    custom = Guard(GuardSettings.model_validate({"distress": table}))
    assert told(custom, ["x"], "Ich mag nicht mehr leben")[0] == "Call 143."


def test_rules_of_the_user() -> None:
    """A phrase broken over two lines, a longer word taken for it, or a ban on input that leaks."""
    guard = Guard(
        GuardSettings(
            rules=(
                *RULES,
                Rule(name="in", words=("atlantis",), on="input", action="block", message="No."),
            )
        )
    )
    assert told(guard, ["Project\n Bluebird, bluebirds"])[0] == "[project], bluebirds"
    assert told(guard, ["T-123 and ST-123"])[0] == "[ticket] and ST-123"
    assert told(guard, ["go on, stop here, or not"]) == ("go on, (ended)", "content_filter")
    assert told(guard, ["x"], "where is Atlantis?") == ("No.", "content_filter")
    assert told(guard, ["Atlantis"])[0] == "Atlantis"


def test_no_pattern_and_no_text_takes_long() -> None:
    """A pattern whose time explodes: `(a+)+$` on such a text never ends in Python's `re`.
    Counted in processor time, with a bound that only an explosion reaches."""
    rule = Rule(name="evil", pattern=r"(a+)+$|(.*)*x{30}", max_chars=1000)
    unlooped = RepetitionTable(enabled=False)  # it would end them before they are long
    settings = GuardSettings(rules=(rule,), repetition=unlooped)
    evil = Guard(settings, notices=Notices(is_silent=True))
    texts = ("a" * 20_000 + "!", "1-" * 10_000, "a@" * 10_000, "(" * 20_000, "+1 " * 7_000,
             "GB29 " * 4_000, "-----BEGIN " * 2_000, "eyJ" * 7_000,
             "I want to " * 2_000, "DA39A3EE5E6B4B0D3255BFEF9560 " * 700)  # fmt: skip
    begun = time.process_time()
    for text in texts:
        told(evil, [text[i : i + 50] for i in range(0, len(text), 50)], text)
    assert time.process_time() - begun < 60


@pytest.mark.parametrize("pattern", ["(a", r"(?=a)b", r"(a)\1"])
def test_a_pattern_that_cannot_be_linear_is_refused(pattern: str) -> None:
    """A server that starts, and fails at the first answer."""
    with pytest.raises(ConfigError, match="RE2"):
        Guard(GuardSettings(rules=(Rule(name="bad", pattern=pattern),)))


def test_the_measured_sentences_are_not_those_of_development() -> None:
    """Rules measured on what they were written for."""
    for kind in HELD_OUT.finds:
        assert not set(HELD_OUT.finds[kind]) & set(DEVELOP.finds[kind])
        assert not set(HELD_OUT.benign[kind]) & set(DEVELOP.benign[kind])
    finds, benign = texts_of("phone", HELD_OUT, 500, 1)
    assert len({s.text for s in (*finds, *benign)}) == 1000
    assert all(sample.value in sample.text for sample in finds)
