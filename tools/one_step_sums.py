"""Sums of one step in the format of GSM8K: a data set on which a tiny model's reward can rise.

    python3 tools/one_step_sums.py FOLDER [--train 6000] [--test 500] [--largest 99] [--seed 0]

Writes FOLDER/train.jsonl and FOLDER/test.jsonl with `question` and `answer`, as openai/gsm8k has
them, so that everything that reads those reads these: `solollm data tuning --gsm8k`, the reward
`gsm8k`, `solollm eval --gsm8k`. No pair of numbers with its operation stands in both files. GSM8K
itself asks for two to eight such steps, and for understanding what is asked.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NAMES = ("Ann", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps")
# At most 12 words each: `solollm data tuning` takes 13 in common for a leak of the test.
QUESTIONS = {
    "+": (
        "{name} has {a} {things} and gets {b} more. How many are there?",
        "{name} finds {a} {things} and buys {b}. How many is that?",
    ),
    "-": (
        "{name} has {a} {things} and gives away {b}. How many are left?",
        "{a} {things} lie here. {name} takes {b}. How many remain?",
    ),
}


class Sum(NamedTuple):
    """`a sign b`; of a difference `a` is the larger."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b


def all_sums(largest: int) -> list[Sum]:
    """Every sum and difference of two numbers from 2 to `largest`, none below 1."""
    numbers = range(2, largest + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    return [Sum(a, "+", b) for a, b in pairs] + [Sum(a, "-", b) for a, b in pairs if a > b]


def rows(sums: list[Sum], count: int, generator: random.Random) -> Iterator[dict[str, str]]:
    """So many questions about these sums, each told in its own words."""
    for one in generator.choices(sums, k=count):
        told = {"name": generator.choice(NAMES), "things": generator.choice(THINGS)}
        question = generator.choice(QUESTIONS[one.sign]).format(a=one.a, b=one.b, **told)
        line = f"{one.a} {one.sign} {one.b} = {one.result} {told['things']}."
        yield {"question": question, "answer": f"{line}\n#### {one.result}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--largest", type=int, default=99)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.largest < 5:
        parser.error("--largest below 5 leaves too few sums to hold some out")
    generator = random.Random(options.seed)
    sums = all_sums(options.largest)
    generator.shuffle(sums)
    held_out = len(sums) // 5
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, part, count in (
        ("test", sums[:held_out], options.test),
        ("train", sums[held_out:], options.train),
    ):
        path = options.folder / f"{name}.jsonl"
        lines = [json.dumps(row) for row in rows(part, count, generator)]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{path}: {count:,} questions about {len(part):,} sums")


if __name__ == "__main__":
    main()
