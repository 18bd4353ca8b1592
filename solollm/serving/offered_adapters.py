"""The adapters that a server offers beside a model: found, and proven to be adapters of that model.

Each engine loads them by itself. They are looked at here first, so that one that does not fit is
one error before anything starts, whatever the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from solollm.adapted import AdapterFolder
from solollm.adapters import ADAPTER_CONFIG
from solollm.bases import base_record, is_adapter
from solollm.completion import TextSide, find_checkpoint, text_side
from solollm.engine_input import read_model_config
from solollm.errors import ConfigError
from solollm.frozen_base import BaseSource, require_content
from solollm.tensorfile import open_weights


@dataclass(frozen=True)
class OfferedAdapter:
    """An adapter of a base.

    Attributes:
        folder: in PEFT's layout or mlx-lm's.
        codec: how the base was held while it was trained; "" where it was not quantised.
        side: its own tokenizer, template and endings, which tuning may have changed; None: the
            base's.
        notes: what a user should hear.
    """

    folder: Path
    codec: str
    side: TextSide | None
    notes: tuple[str, ...] = ()


def open_offered(
    adapters: Mapping[str, Path], base: Path, *, vocab_size: int
) -> dict[str, OfferedAdapter]:
    """The adapters that names stand for: folders, or runs, whose newest checkpoint is meant.

    Args:
        base: the folder of the model they are for; `vocab_size` of its tokenizer.

    Raises:
        ConfigError: no adapter there, or one that is not computed here or speaks other tokens.
        IntegrityError: damaged files, or an adapter of another base.
    """
    offered = {name: _open(path, base) for name, path in adapters.items()}
    _require_base({n: o.folder for n, o in offered.items() if is_adapter(o.folder)}, base)
    for name, adapter in offered.items():
        if adapter.side is not None and adapter.side.tokenizer.vocab_size != vocab_size:
            found = adapter.side.tokenizer.vocab_size
            raise ConfigError(
                f"the adapter {name} has a tokenizer of {found} ids, its base one of {vocab_size}",
                fix="use the base that it was trained on",
            )
    return offered


def _open(path: Path, base: Path) -> OfferedAdapter:
    folder: Path = path
    notes: tuple[str, ...] = ()
    if not (path / ADAPTER_CONFIG).is_file() and (path / "checkpoints").is_dir():
        folder, notes = find_checkpoint(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{path} holds no adapter",
            why=f"there is no {ADAPTER_CONFIG} in it, and it is no run that trains an adapter",
            fix="give such a run, a checkpoint of one, or a folder of PEFT's or mlx-lm's",
        )
    adapter = AdapterFolder(folder, read_model_config(base))
    has_text = is_adapter(folder) and (folder / "tokenizer.json").is_file()
    return OfferedAdapter(folder, adapter.codec, text_side(folder) if has_text else None, notes)


def _require_base(named: Mapping[str, Path], base: Path) -> None:
    """Prove that adapters that know their base by its content have found it, in one pass."""
    if not named:
        return
    weights = open_weights(base)
    try:
        content = BaseSource(weights).content()
    finally:
        weights.close()
    for name, folder in named.items():
        expected = base_record(folder).content
        require_content(content, expected, f"{base}, for the adapter {name},")
