"""Where the base of an adapter's checkpoint lies, and that it is the right one."""

from __future__ import annotations

from pathlib import Path

from solollm.adapters import BASE
from solollm.errors import ConfigError, quoted
from solollm.frozen_base import BaseRecord, BaseSource
from solollm.runs import Run
from solollm.strictfile import parse_json, read_bytes, refused
from solollm.tensorfile import open_weights


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint holds an adapter in the place of a model."""
    return (folder / BASE).is_file()


def base_record(checkpoint: Path) -> BaseRecord:
    """What an adapter's checkpoint says of its base. Raises IntegrityError for a damaged record."""
    path = checkpoint / BASE
    try:
        return BaseRecord.model_validate(parse_json(read_bytes(path), path))
    except ValueError as error:
        raise refused(path, "the record", str(error)) from error


def find_base(checkpoint: Path, given: Path | None = None) -> Path:
    """The base's folder: `given`, or what the run that the checkpoint stands in started from. Its
    content is proven, in one pass over its weights.

    Raises:
        ConfigError: nobody knows where it is.
        IntegrityError: damaged files, or another base than the adapter was trained on.
    """
    record = base_record(checkpoint)
    base = require_place(given or _of_run(checkpoint), checkpoint, hub_id=record.hub_id)
    require_base(base, record.content)
    return base


def require_place(place: Path | None, owner: Path, *, hub_id: str | None = None) -> Path:
    """`place`, where the base of the run or checkpoint `owner` is to be; raises ConfigError where
    no model is there."""
    if place is not None and (place / "config.json").is_file():
        return place
    if place is not None and (place / "checkpoints").is_dir():
        raise ConfigError(
            f"{place} is a run, and the base of {owner} is one of its checkpoints",
            fix=f"give that one: --base {quoted(place / 'checkpoints')}/step-...",
        )
    named = f" ({hub_id} on the Hugging Face hub)" if hub_id else ""
    raise ConfigError(
        f"the base{named} of {owner} is {f'not at {place}' if place else 'not known here'}",
        why="an adapter is only what was learnt beside it",
        fix="put it there, where the run's run.toml says; `solollm resume` and `solollm export` (to"
        " make one model of both: --merge) take another place: --base FOLDER",
    )


def require_base(folder: Path, content: str) -> None:
    """Raise IntegrityError unless `folder` holds the model of that content; one pass over it."""
    weights = open_weights(folder)
    try:
        BaseSource(weights).require(content, str(folder))
    finally:
        weights.close()


def _of_run(checkpoint: Path) -> Path | None:
    run = checkpoint.resolve().parent.parent
    if not (run / "run.toml").is_file():
        return None
    init_from = Run.open(run).config.train.init_from
    return (run / init_from).resolve() if init_from else None
