"""From a foreign model folder, or a hub id, to a folder of SoloLLM's own layout.

What comes out is what the rest of the product reads: canonical names and shapes, plain floating
weights, a `config.json` that every program reads the same way, a tokenizer that passed the check.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from solollm.architecture import ModelConfig
from solollm.backend import ComputeDType
from solollm.errors import ConfigError
from solollm.importing.foreign_config import (
    foreign_generation,
    foreign_token_ids,
    read_foreign_model,
)
from solollm.importing.foreign_folder import ForeignFolder
from solollm.importing.foreign_tokenizer import read_foreign_tokenizer
from solollm.importing.foreign_weights import ForeignWeights
from solollm.importing.hub import HUB_ID, download
from solollm.model_folder import (
    CONFIG,
    GENERATION,
    ORIGIN,
    SHARD_BYTES,
    Origin,
    require_free,
    write_model_folder,
)
from solollm.rounding import DTYPE_NAMES, DTYPE_TAGS
from solollm.strictfile import encode_json
from solollm.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImportReport:
    """What was made. `notes`: what a user should know of the way."""

    out: Path
    origin: Origin
    model: ModelConfig
    dtype: ComputeDType
    num_parameters: int
    num_bytes: int
    vocab_size: int
    notes: tuple[str, ...]


def import_model(
    source: str | Path,
    out: Path,
    *,
    revision: str | None = None,
    dtype: ComputeDType | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ImportReport:
    """Make the model folder `out` from a Llama- or Qwen3-style folder or hub id.

    Args:
        source: a folder that transformers or mlx-lm loads (safetensors; MLX's affine codes are
            turned back into values), or `owner/name` on the Hugging Face hub.
        revision: of a hub id: branch, tag or commit.
        dtype: of the weights; default: as they are stored, float32 for codes. Rounded to nearest.

    Raises:
        ConfigError: no such source, `out` is taken, a model that is not computed here.
        IntegrityError: damaged, hostile or contradictory files; nothing is written.
        SoloLLMError: the hub cannot be reached.
        StorageError: the disk is full or failing; nothing is left at `out`.
    """
    require_free(out)
    folder = ForeignFolder(_find(source, revision))
    with closing(folder.open_weights()) as opened:
        model = read_foreign_model(folder, opened.names())
        weights = ForeignWeights(opened, model)
        tokenizer = read_foreign_tokenizer(folder)
        _require_rows(model, tokenizer, folder)
        tag = DTYPE_TAGS[dtype] if dtype else weights.dtype
        origin = Origin(folder.name, folder.revision, _stored_as(weights))
        ids = foreign_token_ids(folder, tokenizer, model.vocab_size)
        files = {
            CONFIG: encode_json(model.to_hf(torch_dtype=DTYPE_NAMES[tag], **ids)),
            GENERATION: encode_json(foreign_generation(folder, ids, model.vocab_size)),
            ORIGIN: encode_json(origin._asdict()),
            **tokenizer.files(),
        }
        specs, tensors = weights.specs(tag), weights.tensors(tag)
        num_bytes = write_model_folder(out, files, specs, tensors, shard_bytes=shard_bytes)
    return ImportReport(
        out=out,
        origin=origin,
        model=model,
        dtype=DTYPE_NAMES[tag],
        num_parameters=model.num_parameters(),
        num_bytes=num_bytes,
        vocab_size=tokenizer.vocab_size,
        notes=_notes(weights),
    )


def _find(source: str | Path, revision: str | None) -> Path:
    """The local folder, or the downloaded one."""
    if Path(source).is_dir():
        if revision is not None:
            raise ConfigError(
                f"{source} is a folder: a --revision is the hub's", fix="leave it out"
            )
        return Path(source)
    if not HUB_ID.fullmatch(str(source)):
        raise ConfigError(
            f"{source} is no folder",
            why="and it has not the form of a hub id, owner/name",
            fix="give a folder with config.json, or a hub id",
        )
    return download(str(source), revision)


def _require_rows(model: ModelConfig, tokenizer: Tokenizer, folder: ForeignFolder) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {folder.path} has {tokenizer.vocab_size} ids, its model rows for"
            f" {model.vocab_size}",
            why="some texts would have ids without an embedding",
            fix="use the tokenizer that the model was trained with",
        )


def _stored_as(weights: ForeignWeights) -> str:
    if weights.num_quantized:
        return f"affine codes ({weights.num_quantized} matrices)"
    return DTYPE_NAMES[weights.dtype]


def _notes(weights: ForeignWeights) -> tuple[str, ...]:
    notes = []
    if weights.num_quantized:
        notes.append(
            f"{weights.num_quantized} quantised matrices became plain values again; what their"
            " rounding lost stays lost"
        )
    if weights.left_out:
        names = ", ".join(weights.left_out[:3]) + (", ..." if len(weights.left_out) > 3 else "")
        notes.append(f"left out, because the model does not use them: {names}")
    return tuple(notes)
