"""`solollm export`: the skin of `solollm.export.export_model`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from solollm.commands import console, print_json

if TYPE_CHECKING:
    from solollm.backend import ComputeDType
    from solollm.export import ExportReport, Target

_EPILOG = """\b
Examples:
  solollm export runs/first --to hf --dtype bfloat16 --out exports/first
  solollm export runs/first --to mlx --bits 4 --dtype bfloat16 --out exports/first-4bit
  solollm export runs/tuned --to hf --merge --out exports/tuned
  solollm export runs/first --to gguf --bits 8 --out exports/first-ollama
  solollm export runs/first/checkpoints/step-00001000 --to hf --out exports/step-1000
"""


@click.command("export", epilog=_EPILOG)
@click.argument("source", type=click.Path(path_type=Path), metavar="RUN_OR_CHECKPOINT")
@click.option(
    "--to", "target", type=click.Choice(["hf", "mlx", "gguf"]), required=True,
    help="hf: transformers, vLLM and others; mlx: mlx-lm; gguf: llama.cpp and Ollama.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights; default: as they are stored.",
)  # fmt: skip
@click.option("--bits", type=click.Choice(["4", "8"]), help="Quantise matrices; not --to hf.")
@click.option("--merge", is_flag=True, help="An adapter's run: base and adapter in one.")
@click.option("--base", type=click.Path(path_type=Path), help="Its base, if it was moved.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def command(
    *, source: Path, target: Target, out: Path, dtype: ComputeDType | None, bits: str | None,
    merge: bool, base: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Write a model as a folder that other programs load.

    RUN_OR_CHECKPOINT is a run (its newest intact checkpoint), a checkpoint, or an imported model.
    """
    from solollm.export import export_model

    report = export_model(
        source, out, target=target, dtype=dtype, bits=int(bits) if bits else None, merge=merge,
        base=base,
    )  # fmt: skip
    if as_json:
        print_json(asdict(report))
    else:
        _show(report)


def _show(report: ExportReport) -> None:
    from solollm.planner import format_bytes

    codes = f", matrices in {report.bits} bits" if report.bits else ""
    lines = [
        *report.notes,
        f"written to {report.out}: {report.num_parameters:,} parameters, {report.dtype}{codes},"
        f" {format_bytes(report.num_bytes)}",
    ]
    if report.plain_matrices:
        lines.append(
            f"{len(report.plain_matrices)} matrices stay {report.dtype}: their rows do not divide"
            f" into groups of {32 if report.target == 'gguf' else 64}"
        )
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)
