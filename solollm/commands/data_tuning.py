"""`solollm data tuning`: the terminal skin of `solollm.evaluation.tuning_data`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from solollm.commands import console, print_json

_EPILOG = """\b
Examples:
  solollm data tuning --gsm8k data/gsm8k --out sft.jsonl
  solollm data tuning --mmlu data/mmlu --mmlu-split train --mmlu-repeats 3 \\
      --gsm8k data/gsm8k --gsm8k-repeats 4 --out sft.jsonl
"""


@click.command("tuning", epilog=_EPILOG)
@click.option("--mmlu", type=click.Path(path_type=Path), help="Folder of MMLU.")
@click.option("--mmlu-split", type=click.Choice(["train", "validation", "dev"]), default="train",
              show_default=True, help="train: its auxiliary train split.")  # fmt: skip
@click.option("--mmlu-repeats", type=click.IntRange(1), default=1, show_default=True,
              help="Times each question is shown, its choices turned.")  # fmt: skip
@click.option("--gsm8k", type=click.Path(path_type=Path), help="Folder with train.jsonl.")
@click.option("--gsm8k-repeats", type=click.IntRange(1), default=1, show_default=True)
@click.option("--shape", type=click.Choice(["messages", "prompt"]), default="messages",
              show_default=True, help="prompt: for scoring without a chat template.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON lines to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def tuning(
    mmlu: Path | None, mmlu_split: str, mmlu_repeats: int, gsm8k: Path | None,
    gsm8k_repeats: int, shape: Literal["messages", "prompt"], seed: int, out: Path, as_json: bool,
) -> None:  # fmt: skip
    """Write training examples in the formats of MMLU and GSM8K.

    They come from splits that are not scored. What shares 13 words with a test question of the
    same copies is dropped, and counted.
    """
    from solollm.errors import ConfigError
    from solollm.evaluation.local_data import read_gsm8k, read_mmlu
    from solollm.evaluation.tuning_data import tuning_data, write_examples

    if mmlu is None and gsm8k is None:
        raise ConfigError("nothing to make examples of", fix="give --mmlu FOLDER or --gsm8k FOLDER")
    choices = read_mmlu(mmlu, (mmlu_split, "test")) if mmlu else {}
    problems = read_gsm8k(gsm8k, "train") if gsm8k else []
    tests = [f"{item.question} {' '.join(item.choices)}" for item in choices.get("test", [])]
    tests += [problem.question for problem in read_gsm8k(gsm8k)] if gsm8k else []
    made = tuning_data(
        choices.get(mmlu_split, []), problems, tests=tests,
        repeats={"mmlu": mmlu_repeats, "gsm8k": gsm8k_repeats}, seed=seed,
    )  # fmt: skip
    write_examples(made.examples, out, shape)
    asked = {"mmlu": mmlu, "gsm8k": gsm8k}
    counts = {name: sum(e.source == name for e in made.examples) for name in asked if asked[name]}
    if as_json:
        leaked = {name: made.leaked[name] for name in counts}
        print_json({"out": out, "examples": counts, "dropped_as_leaks": leaked})
        return
    for name, count in counts.items():
        console().print(f"{name}: {count:,} examples, {made.leaked[name]:,} dropped as leaks")
    console().print(f"written to {out}", soft_wrap=True)
