"""`solollm generate`: the terminal skin of `solollm.completion`."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from solollm.commands import print_json

if TYPE_CHECKING:
    from solollm.backend import SamplingParams

_Function = TypeVar("_Function", bound=Callable[..., Any])
_CONTROLS = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - {"\n", "\t"}
_EPILOG = """\b
Examples:
  solollm generate runs/first "def main("
  solollm generate runs/first "Once upon a time" --temperature 0 --max-new-tokens 40
  solollm generate checkpoint-folder "The" --seed 7 --json
"""


def sampling_options(function: _Function) -> _Function:
    """The options that `generate` and `chat` share."""
    shown = partial(click.option, show_default=True)
    options = [
        shown("--max-new-tokens", type=click.IntRange(1), default=256),
        shown("--temperature", default=0.8, help="0: always the likeliest."),
        shown("--top-k", default=0, help="Only the k likeliest; 0: off."),
        shown("--top-p", default=0.95, help="The likeliest that hold p."),
        shown("--min-p", default=0.0, help="At least p times the likeliest."),
        shown("--repetition-penalty", default=1.0, help="1: off."),
        click.option("--seed", type=click.IntRange(0), help="Same seed, same text; else drawn."),
        shown("--backend", default="auto", help="auto, or the name of one."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def read_sampling(values: dict[str, Any]) -> SamplingParams:
    """Take the sampling options out of a command's arguments, and check them."""
    from solollm.backend import SamplingParams
    from solollm.sampling import check_sampling

    seed = values.pop("seed")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    settings = {name: values.pop(name) for name in names}
    sampling = SamplingParams(seed=secrets.randbelow(2**31) if seed is None else seed, **settings)
    check_sampling(sampling)
    return sampling


@click.command("generate", epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path), metavar="RUN_OR_CHECKPOINT")
@click.argument("prompt")
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
def command(model: Path, prompt: str, as_json: bool, **values: Any) -> None:
    """Continue PROMPT with a model.

    A run folder stands for its newest intact checkpoint. The text is printed as it comes, the
    prompt first.
    """
    from solollm.completion import open_model, stream_text
    from solollm.errors import ConfigError
    from solollm.generation import completion

    sampling = read_sampling(values)
    if not prompt:
        raise ConfigError("the prompt is empty", fix="give a text to continue, if only one word")
    opened = open_model(model, backend=values["backend"])
    pieces = stream_text(
        opened, prompt, max_new_tokens=values["max_new_tokens"], sampling=sampling
    )  # fmt: skip
    if not as_json:
        # What cannot be continued is refused before it is repeated.
        first, _ = next(pieces, ("", None))
        show(prompt + first)
        for text, _ in pieces:
            show(text)
        show("\n")
        return
    parts = list(pieces)
    tokens = completion(event for _, event in parts)
    print_json(
        {
            "prompt": prompt,
            "text": "".join(text for text, _ in parts),
            "ids": tokens.ids,
            "logprobs": tokens.logprobs,
            "finish_reason": tokens.finish_reason,
            "seed": sampling.seed,
            "checkpoint": opened.checkpoint,
            "notes": opened.notes,
        }
    )


def show(text: str) -> None:
    """Write generated text at once. A terminal gets no control characters but line ends and tabs:
    a model may produce any byte, and some of them would repaint the screen."""
    if sys.stdout.isatty():
        text = "".join("\ufffd" if c in _CONTROLS else c for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()
