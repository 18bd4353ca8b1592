"""Texts to measure the guard on, as many as wanted, from the sentences of `sample_texts`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from solollm.guard import sample_values as values
from solollm.guard.sample_texts import Texts

PERSONAL_KINDS = ("email", "phone", "card", "iban", "id_number", "key")
_FILL_PER_SIDE = 2  # sentences of ordinary text before and after


class Sample(NamedTuple):
    """A text; `value` is what must not be shown (empty: nothing in particular)."""

    text: str
    value: str = ""


def personal(kind: str, texts: Texts, rng: random.Random) -> Sample:
    """An answer that gives away somebody's data."""
    makers: dict[str, Callable[[random.Random], str]] = {
        "email": values.email, "card": values.card, "iban": values.iban,
        "id_number": values.id_number, "key": values.key,
        "phone": lambda r: values.shaped(r, r.choice(texts.phone_shapes)),
    }  # fmt: skip
    value = makers[kind](rng)
    sentence = rng.choice(texts.finds[kind])
    return Sample(_around(_filled(sentence, rng, value), rng), value)


def benign(kind: str, texts: Texts, rng: random.Random) -> Sample:
    """An answer (of `distress`: a message) that only looks so."""
    sentence = _filled(rng.choice(texts.benign[kind]), rng)
    if kind == "distress":
        return Sample(rng.choice(_GREETINGS) + sentence + rng.choice(_CLOSINGS))
    return Sample(_around(sentence, rng))


def distress(texts: Texts, rng: random.Random) -> Sample:
    """A message of somebody in danger, with or without something before it."""
    sentence = _filled(rng.choice(texts.finds["distress"]), rng)
    if rng.random() < 0.2:
        sentence = sentence.upper() if rng.random() < 0.3 else sentence.lower()
    return Sample(rng.choice(_OPENINGS) + sentence + rng.choice(("", ".", "...", " Please help.")))


def loop(rng: random.Random) -> Sample:
    """An answer that begins well and then goes round in circles."""
    kind = rng.randrange(5)
    if kind == 0:  # a sentence or a few of them
        unit = " ".join(_sentence(rng) for _ in range(rng.randint(1, 4))) + " "
    elif kind == 1:  # a word or two
        unit = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 3))) + " "
    elif kind == 2:  # a line of code
        unit = f"    {rng.choice(_WORDS)} = {rng.choice(_WORDS)}({rng.randint(0, 9)})\n"
    elif kind == 3:  # an item of a list that counts on
        items = [_sentence(rng)] * 40
        body = "".join(f"{place}. {item}\n" for place, item in enumerate(items, 1))
        return Sample(_paragraph(rng, 3) + "\n" + body)
    else:  # one sign
        unit = rng.choice("!=-.0 ")
    return Sample(_paragraph(rng, 3) + " " + unit * (3000 // len(unit)))


def ordinary(rng: random.Random) -> Sample:
    """An answer that repeats itself as good ones do: lists, tables, refrains, rows of numbers."""
    kind = rng.randrange(6)
    if kind == 0:
        text = _paragraph(rng, rng.randint(5, 25))
    elif kind == 1:  # a table
        rows = [
            f"| {rng.choice(_WORDS)} | {rng.randint(0, 9)} | {rng.randint(0, 9)} |"
            for _ in range(30)
        ]
        text = "| a | b | c |\n|---|---|---|\n" + "\n".join(rows)
    elif kind == 2:  # a zero matrix in code
        text = (
            f"m = [\n{'    [0, 0, 0, 0, 0, 0],' + chr(10)}" + "    [0, 0, 0, 1, 0, 0],\n" * 5 + "]"
        )
    elif kind == 3:  # items that begin alike
        text = "\n".join(f"{i}. {rng.choice(_STARTS)} {_sentence(rng)}" for i in range(1, 25))
    elif kind == 4:  # a song with its refrain
        refrain = _sentence(rng) + "\n"
        text = "".join(f"{_sentence(rng)}\n{_sentence(rng)}\n{refrain}\n" for _ in range(5))
    else:  # lines and rules
        text = f"{'=' * 72}\n{_sentence(rng)}\n{'-' * 72}\n{_paragraph(rng, 5)}\n{'=' * 72}\n"
    return Sample(text)


def ruled(rng: random.Random) -> tuple[Sample, Sample]:
    """A text that breaks the rules of `measurement`, and one that nearly does."""
    name, number = (
        rng.choice(("Project Bluebird", "project  bluebird", "PROJECT BLUEBIRD")),
        values.digits(rng, 6),
    )
    value, near = rng.choice(
        (
            (name, rng.choice(("a bluebird project", "Project Blue", "projects: bluebirds"))),
            (f"TICKET-{number}", f"ticket {number[:3]}, TICKETS-{number[:2]}"),
            (f"https://intra.corp/{number}", f"https://intra.corporate/{number}"),
        )
    )
    return Sample(_around(f"See {value} for more.", rng), value), Sample(
        _around(f"See {near} now.", rng)
    )


def drawn(make: Callable[[random.Random], Sample], count: int, seed: int) -> Iterator[Sample]:
    """`count` different texts."""
    rng, seen = random.Random(seed), set[str]()
    for _ in range(1000 * count):
        sample = make(rng)
        if sample.text not in seen:
            seen.add(sample.text)
            yield sample
        if len(seen) == count:
            return
    raise AssertionError("the templates give no more different texts")


def _filled(sentence: str, rng: random.Random, value: str = "") -> str:
    """Digits in, then name and value, so that a value's own signs stay as they are."""
    name = f"{rng.choice(values.FIRST)} {rng.choice(values.LAST)}"
    return values.shaped(rng, sentence).format(v=value, n=name)


def _around(text: str, rng: random.Random) -> str:
    """A text between ordinary ones."""
    before, after = (_paragraph(rng, rng.randint(0, _FILL_PER_SIDE)) for _ in range(2))
    joint = rng.choice((" ", "\n"))
    return f"{before}{joint}{text}{joint + after if after else ''}"


def _paragraph(rng: random.Random, count: int) -> str:
    return " ".join(_sentence(rng) for _ in range(count))


def _sentence(rng: random.Random) -> str:
    words = [rng.choice(_WORDS) for _ in range(rng.randint(5, 14))]
    return " ".join(words).capitalize() + rng.choice((".", ".", ".", "?", "!"))


_WORDS = (
    "the", "a", "this", "that", "river", "model", "value", "house", "garden", "number", "light",
    "winter", "table", "which", "writes", "reads", "keeps", "gives", "under", "over", "between",
    "after", "slow", "bright", "small", "early", "green", "open", "quiet", "first", "second",
    "careful", "again", "almost", "never", "often", "with", "without", "train", "paper", "glass",
    "music", "answer", "question", "reason", "letter", "engine", "harbour",
)  # fmt: skip
_STARTS = ("The model writes", "Then one reads", "It follows that", "First of all, the value keeps")
_OPENINGS = (
    "", "hey. ", "Hello, I don't know whom else to ask. ", "ok so ", "It's 3am and I can't sleep. ",
    "I lost my job in March and it got worse. ", "Can I tell you something? ",
    "sorry to bother you, but ", "I've never said this to anyone: ", "my doctor did not listen. ",
    "you are the only one I talk to. ",
)  # fmt: skip
_GREETINGS = (
    "", "Hi! ", "Quick question: ", "Good morning. ", "I'm writing an essay. ", "Hey, ", "So, um. ",
    "My class discussed this today. ", "You helped me last week. ", "It's late, but: ",
    "Please help me. ",
)  # fmt: skip
_CLOSINGS = ("", " Thanks!", " Keep it short.", " I'd be glad of sources.", " Cheers, a reader")
