"""Where a corpus may be put, and what killed builds left there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from solollm.data.shards import INDEX_NAME
from solollm.durable import TEMPORARY, make_directory, remove_tree
from solollm.errors import ConfigError


def check_out(out: Path, sources: Sequence[str], *, overwrite: bool) -> None:
    """Raises ConfigError unless `out` is free, or a corpus that may be replaced."""
    for source in sources:
        inside = (out.resolve(), *out.resolve().parents)
        if "://" not in source and Path(source).resolve() in inside:
            raise ConfigError(
                f"the corpus {out} would lie inside its own source {source}",
                why="the next build would read this one's files",
                fix="choose an output folder elsewhere",
            )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / INDEX_NAME).is_file():
        raise ConfigError(
            f"{out} exists and is no corpus", fix="choose another folder, or move it away"
        )
    if not overwrite:
        raise ConfigError(
            f"{out} already holds a corpus", fix="choose another folder, or give --overwrite"
        )


@contextlib.contextmanager
def swept(out: Path) -> Iterator[None]:
    """Deletes what killed builds of `out` left beside it, unless another build may be at work.

    Every build holds a shared lock on the parent folder; only who gets it alone may sweep.
    """
    make_directory(out.parent)
    descriptor = os.open(out.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sweep(out)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _sweep(out: Path) -> None:
    left = re.compile(re.escape(f"{TEMPORARY}{out.name}-") + "[0-9a-f]{8}")
    for path in out.parent.iterdir():
        if left.fullmatch(path.name):
            remove_tree(path, first=(INDEX_NAME,))
