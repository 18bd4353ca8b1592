"""What can be exported: a run, a checkpoint, or a plain model folder such as an imported one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solollm.adapted import AdapterFolder, MergedSource
from solollm.architecture import ModelConfig
from solollm.backend import TensorSource
from solollm.bases import find_base, is_adapter
from solollm.checkpoint import TrainerState, check_parameters, open_checkpoint
from solollm.completion import find_checkpoint
from solollm.errors import ConfigError, IntegrityError, quoted
from solollm.manifest import MANIFEST
from solollm.model_folder import (
    CONFIG,
    GENERATION,
    Origin,
    read_model,
    read_origin,
    token_ids,
)
from solollm.strictfile import read_table
from solollm.tensorfile import Weights, open_weights
from solollm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """An opened model. `tensors` proves what it reads where the source is a checkpoint; `dtypes`
    are those its weights are stored in; `state` and `run` are a checkpoint's, `origin` an imported
    model's."""

    path: Path
    model: ModelConfig
    tensors: TensorSource
    dtypes: frozenset[str]
    token_ids: Mapping[str, int]
    generation: Mapping[str, Any]
    tokenizer: Tokenizer
    state: TrainerState | None
    run: Path | None
    origin: Origin | None
    notes: tuple[str, ...]


@contextmanager
def open_source(path: Path, *, merge: bool = False, base: Path | None = None) -> Iterator[Source]:
    """Open what `path` means: the newest intact checkpoint of a run, or the folder itself. With
    `merge` an adapter comes as the whole model that it makes of its base; `base` is where that
    lies, if not where the run says.

    Raises:
        ConfigError: no model there; an adapter without `merge`, or no adapter with it.
        IntegrityError: damaged files, or weights that are not the model's own.
    """
    folder, notes = find_checkpoint(path)
    _check_merge(folder, merge=merge)
    if merge:
        with _open_merged(folder, find_base(folder, base), notes) as source:
            yield source
        return
    with ExitStack() as stack:
        weights = open_weights(folder)
        stack.callback(weights.close)
        tensors: TensorSource = weights
        state = None
        if (folder / MANIFEST).exists():
            checkpoint = open_checkpoint(folder, verify="sizes")
            stack.callback(checkpoint.close)
            state, tensors = checkpoint.state, checkpoint.parameters()
        raw = read_table(folder / CONFIG)
        model = read_model(raw, folder / CONFIG)
        _require_own_layout(weights, model, folder)
        run = folder.resolve().parent.parent
        yield Source(
            path=folder,
            model=model,
            tensors=tensors,
            dtypes=frozenset(weights.info(name).dtype for name in weights.names()),
            token_ids=token_ids(raw),
            generation=_generation(folder, raw),
            tokenizer=_tokenizer(folder),
            state=state,
            run=run if (run / "run.toml").is_file() else None,
            origin=read_origin(folder),
            notes=notes,
        )


def _check_merge(folder: Path, *, merge: bool) -> None:
    if is_adapter(folder) and not merge:
        raise ConfigError(
            f"{folder} holds an adapter, not a whole model",
            why="it is in PEFT's layout as it stands: PeftModel.from_pretrained(base, folder)",
            fix="give --merge for the model that it makes of its base",
        )
    if merge and not is_adapter(folder):
        raise ConfigError(f"{folder} holds a whole model: there is nothing to merge",
                          fix="leave --merge out")  # fmt: skip


@contextmanager
def _open_merged(folder: Path, base: Path, notes: tuple[str, ...]) -> Iterator[Source]:
    """An adapter's checkpoint and its base, as one model in float32."""
    with ExitStack() as stack:
        checkpoint = open_checkpoint(folder)
        stack.callback(checkpoint.close)
        weights = open_weights(base)
        stack.callback(weights.close)
        check_parameters(weights, checkpoint.model)
        raw = read_table(base / CONFIG)
        adapter = AdapterFolder(folder, checkpoint.model)
        run = folder.resolve().parent.parent
        held = f", decoded from {adapter.codec}," if adapter.codec else ""
        yield Source(
            path=folder,
            model=checkpoint.model,
            tensors=MergedSource(weights, adapter, checkpoint.model),
            dtypes=frozenset({"F32"}),
            token_ids=token_ids(raw),
            generation=read_table(folder / GENERATION),
            tokenizer=_tokenizer(folder),
            state=checkpoint.state,
            run=run if (run / "run.toml").is_file() else None,
            origin=read_origin(base),
            notes=(*notes, f"the adapter is merged into its base{held} in float32"),
        )


def _require_own_layout(weights: Weights, model: ModelConfig, folder: Path) -> None:
    try:
        check_parameters(weights, model)
    except IntegrityError as error:
        command = f"solollm import {quoted(folder)} --out models/NAME"
        fix = f"if it is another program's: {command}, then that"
        raise IntegrityError(error.what, why=error.why, fix=fix) from error


def _generation(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / GENERATION
    return read_table(path) if path.is_file() else dict(token_ids(raw))


def _tokenizer(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"{folder} holds no tokenizer",
            why="a model without its tokenizer.json is of no use to anybody",
            fix="copy the files of the tokenizer it was trained with into that folder",
        )
    return Tokenizer.load(folder)
