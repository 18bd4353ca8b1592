"""`solollm import`: the skin of `solollm.importing.import_model`. (`import` is no module name.)"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from solollm.commands import console, print_json
from solollm.errors import ConfigError, quoted

if TYPE_CHECKING:
    from solollm.backend import ComputeDType
    from solollm.importing import ImportReport

_EPILOG = """\b
Examples:
  solollm import owner/name --out models/name
  solollm import ~/downloads/some-model-4bit --out models/some-model --dtype bfloat16
  solollm import ~/downloads/some-adapter --base models/name --out adapters/some-adapter
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
@click.option("--base", type=click.Path(path_type=Path), help="An adapter's base model.")
@click.option("--revision", help="Of a hub id: branch, tag or commit.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights; default: as they are stored, float32 for MLX codes.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def command(
    *, source: str, out: Path, base: Path | None, revision: str | None,
    dtype: ComputeDType | None, as_json: bool,
) -> None:  # fmt: skip
    """Make a Llama- or Qwen3-style model of others ready to train on and to talk to.

    FOLDER_OR_HUB_ID is a folder that transformers or mlx-lm loads, or owner/name on the Hugging
    Face hub. Weights are read from safetensors only, and no code of the model is run. A folder of
    PEFT's or mlx-lm's that holds an adapter becomes one here, for the model --base.
    """
    from solollm.importing import import_model, is_adapter_folder

    if is_adapter_folder(source):
        _import_adapter(Path(source), out, base, as_json=as_json)
        return
    if base is not None:
        raise ConfigError(f"{source} is no adapter", fix="leave --base out")
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


def _import_adapter(source: Path, out: Path, base: Path | None, *, as_json: bool) -> None:
    from solollm.importing import import_adapter

    if base is None:
        raise ConfigError(
            f"{source} holds an adapter",
            why="which matrices it fits, only its base says",
            fix="give the base model's folder: --base FOLDER",
        )
    report = import_adapter(source, out, base)
    if as_json:
        print_json(
            {
                "out": report.out, "origin": report.origin,
                "adapter": report.options.model_dump(mode="json"),
                "num_parameters": report.num_parameters, "num_bytes": report.num_bytes,
                "notes": report.notes,
            }
        )  # fmt: skip
        return
    options = report.options
    for line in (
        *report.notes,
        f"written to {out}: an adapter from {report.origin}, rank {options.rank}, scale"
        f" {options.scale:g}, of {', '.join(options.target_modules)}, in PEFT's layout",
    ):
        console().print(line, markup=False, soft_wrap=True)


def _show(report: ImportReport) -> None:
    from solollm.planner import format_bytes

    model, out = report.model, report.out
    folder = quoted(out)
    lines = [
        *report.notes,
        f"written to {out}: {report.num_parameters:,} parameters in {model.num_hidden_layers}"
        f" layers, {report.vocab_size:,} tokens, {report.dtype}, {format_bytes(report.num_bytes)}",
        f'next     solollm generate {folder} "Once upon a time"',
        f"         solollm data build SOURCES --tokenizer {folder} --out corpora/NAME",
        f"         solollm pretrain --corpus corpora/NAME --init-from {folder} --run runs/NAME",
    ]
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)
