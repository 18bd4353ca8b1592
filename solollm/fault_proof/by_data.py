"""A corpus that is elsewhere, damaged, or another one."""

from __future__ import annotations

import shutil
from pathlib import Path

from solollm.data.shards import INDEX_NAME, encode_index, read_index, sealed, shard_path
from solollm.fault_proof.ground import (
    SAVED,
    Fault,
    Ground,
    content_of,
    flip_bit,
    require,
    require_said,
)


def _moved(ground: Ground) -> str:
    run, corpus = _with_own_corpus(ground)
    elsewhere = ground.folder / "elsewhere"
    corpus.rename(elsewhere)
    before = content_of(run)
    ended = ground.resume(run, code=2)
    require_said(ended, str(corpus), "--corpus")
    require(content_of(run) == before, "a refused run was changed")
    ground.goes_on(run, "--corpus", str(elsewhere))
    return f"exit code 2; with --corpus it went on from step {SAVED}"


def _changed(ground: Ground) -> str:
    run, corpus = _with_own_corpus(ground)
    shard = shard_path(corpus, "train", 0)
    content = shard.read_bytes()
    before = content_of(run)
    for place in (0.0, 0.5, 1.0):
        shard.write_bytes(content)
        flip_bit(shard, place)
        ended = ground.resume(run, code=3)
        require_said(ended, shard.name, "is damaged")
        require(content_of(run) == before, "a refused run was changed")
    shard.write_bytes(content)
    ground.goes_on(run)
    return f"exit code 3 at each of 3 places; mended, it went on from step {SAVED}"


def _another(ground: Ground) -> str:
    run, corpus = _with_own_corpus(ground)
    other = ground.folder / "other"
    shutil.copytree(corpus, other)
    index = read_index(other)
    splits = {
        name: record.model_copy(update={"text_bytes": record.text_bytes + 1})
        for name, record in index.splits.items()
    }
    changed = sealed(index.model_copy(update={"splits": splits}))
    (other / INDEX_NAME).write_bytes(encode_index(changed))
    before = content_of(run)
    ended = ground.resume(run, "--corpus", str(other), code=3)
    require_said(ended, "fingerprint", "the run was started on")
    require(content_of(run) == before, "a refused run was changed")
    ground.goes_on(run)
    return f"exit code 3; with its own it went on from step {SAVED}"


def _with_own_corpus(ground: Ground) -> tuple[Path, Path]:
    """A run that reads a copy of the corpus, which may be harmed."""
    corpus = ground.folder / "corpus"
    shutil.copytree(ground.base.corpus, corpus)
    return ground.run(data={"corpus": f"../{corpus.name}"}), corpus


FAULTS = (
    Fault(
        "corpus-moved", "the corpus is not where it was",
        "exit code 2, with its place and what to type; nothing is changed", _moved,
    ),
    Fault(
        "corpus-changed", "one bit of the corpus is turned over",
        "exit code 3, with the file; not a step is trained on it", _changed,
    ),
    Fault(
        "corpus-of-another", "another corpus is given",
        "exit code 3, with both fingerprints; nothing is changed", _another,
    ),
)  # fmt: skip
