"""`solollm import`: the skin of `solollm.importing.import_model`. (`import` is no module name.)"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from solollm.commands import console, print_json

if TYPE_CHECKING:
    from solollm.backend import ComputeDType
    from solollm.importing import ImportReport

_EPILOG = """\b
Examples:
  solollm import owner/name --out models/name
  solollm import ~/downloads/some-model-4bit --out models/some-model --dtype bfloat16
\b
Then:
  solollm chat models/name
  solollm data build notes/ --tokenizer models/name --out corpora/notes
  solollm pretrain --corpus corpora/notes --init-from models/name --run runs/further
\b
A hub id is downloaded into the Hugging Face cache (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE=1).
"""


@click.command("import", epilog=_EPILOG)
@click.argument("source", metavar="FOLDER_OR_HUB_ID")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option("--revision", help="Of a hub id: branch, tag or commit.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights; default: as they are stored, float32 for MLX codes.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def command(
    *, source: str, out: Path, revision: str | None, dtype: ComputeDType | None, as_json: bool
) -> None:
    """Make a Llama- or Qwen3-style model of others ready to train on and to talk to.

    FOLDER_OR_HUB_ID is a folder that transformers or mlx-lm loads, or owner/name on the Hugging
    Face hub. Weights are read from safetensors only, and no code of the model is run.
    """
    from solollm.importing import import_model

    report = import_model(source, out, revision=revision, dtype=dtype)
    if as_json:
        print_json(
            {
                "out": report.out, "origin": report.origin._asdict(),
                "model": report.model.model_dump(mode="json"), "dtype": report.dtype,
                "num_parameters": report.num_parameters, "num_bytes": report.num_bytes,
                "vocab_size": report.vocab_size, "notes": report.notes,
            }
        )  # fmt: skip
    else:
        _show(report)


def _show(report: ImportReport) -> None:
    from solollm.planner import format_bytes

    model, out = report.model, report.out
    lines = [
        *report.notes,
        f"written to {out}: {report.num_parameters:,} parameters in {model.num_hidden_layers}"
        f" layers, {report.vocab_size:,} tokens, {report.dtype}, {format_bytes(report.num_bytes)}",
        f'next     solollm generate {out} "Once upon a time"',
        f"         solollm data build SOURCES --tokenizer {out} --out corpora/NAME",
        f"         solollm pretrain --corpus corpora/NAME --init-from {out} --run runs/NAME",
    ]
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)
