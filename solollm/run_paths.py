"""The paths in a run's configuration: as seen from the run's folder on disk, from here in use.

A project folder can then be moved as a whole, and no file of a run names a place of this machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from solollm.bases import require_place
from solollm.config import RunConfig
from solollm.data.shards import INDEX_NAME
from solollm.errors import ConfigError
from solollm.horizon import trains_adapter, updated

_PATHS = (("data", "corpus"), ("data", "decay_corpus"), ("train", "init_from"))


def with_paths_from(config: RunConfig, run: Path) -> RunConfig:
    """The config with its paths rewritten as seen from the run's folder, which is how `run.toml`
    holds them: a project folder can then be moved as a whole."""
    return _map_paths(config, lambda path: os.path.relpath(Path(path).resolve(), run.resolve()))


def with_paths_to(config: RunConfig, run: Path) -> RunConfig:
    """The other way: a config read from `run.toml`, its paths usable from here."""
    return _map_paths(config, lambda path: str((run.resolve() / path).resolve()))


def with_corpora(config: RunConfig, run: Path, corpus: Path | None) -> RunConfig:
    """The config with the corpus where it lies now. Raises ConfigError where there is none; the
    samples of a fine-tuning are the run's own."""
    if corpus is not None:
        config = updated(config, "data", corpus=str(corpus))
    table, fix = (
        config.data,
        "put it back there; `solollm resume --corpus FOLDER` finds it elsewhere",
    )
    for place in filter(None, (table.corpus, table.decay_corpus)):
        if config.finetune is None and not (Path(place) / INDEX_NAME).is_file():
            raise ConfigError(
                f"the corpus of {run} is not at {place}",
                why="a run goes on with the corpus that it began with, and with no other",
                fix=fix if place == table.corpus else "put the corpus of the decay stage there",
            )
    return config


def _map_paths(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    for table, name in _PATHS:
        path = getattr(getattr(config, table), name)
        if path:
            config = updated(config, table, **{name: change(path)})
    return config


def with_base(config: RunConfig, run: Path, base: Path | None) -> RunConfig:
    """The config with an adapter's base where it lies now. Raises ConfigError where there is
    none."""
    if not trains_adapter(config):
        return config
    place = require_place(base or Path(config.train.init_from), run)
    return updated(config, "train", init_from=str(place))
