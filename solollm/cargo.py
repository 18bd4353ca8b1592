"""What leaves when a run moves: its files, read as they are, and a checkpoint that promises.

Before a run leaves, the certificate of its checkpoint is made to say what comes next
(`solollm.continuation`), for which a session is opened here. Where the files land stands in
`solollm.bundle`; they travel in one file (`solollm.packing`) or by rsync (`solollm.pushing`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from solollm.archive import Source, hash_source
from solollm.bases import require_base, require_place
from solollm.bundle import RUN_FILES, Bundle, is_movable, seal
from solollm.certificate import Certificate
from solollm.checkpoint import (
    CERTIFICATE,
    Checkpoint,
    add_continuation,
    latest_checkpoint,
    open_checkpoint,
    step_name,
)
from solollm.config import RunConfig, dump_config
from solollm.continuation import look_ahead
from solollm.data.canaries import CANARIES_NAME
from solollm.data.decontamination import LOOKED_FOR_NAME
from solollm.data.report import REPORT_NAME
from solollm.data.shards import (
    INDEX_NAME,
    TOKENIZER_FOLDER,
    corpus_files,
    read_index,
    verify_corpus,
)
from solollm.environments import Recorded, environment_of, lineage_entry
from solollm.errors import ConfigError, IntegrityError, quoted
from solollm.finetune.objectives import give_references
from solollm.finetune.samples import sample_files
from solollm.horizon import updated
from solollm.manifest import MANIFEST, read_manifest
from solollm.model_folder import model_files
from solollm.pretraining import open_session, prepare
from solollm.run_paths import with_corpora, with_paths_to
from solollm.run_streams import open_streams
from solollm.runs import Run

_ODD = re.compile(r"[^A-Za-z0-9_.-]+")
_PLAIN_LENGTH = 60  # of a base's own name, so that with its content it can travel


@dataclass(frozen=True)
class Cargo:
    """A run ready to leave: the list, and where each file's content is now. `skipped`: an older
    checkpoint that should have come along and is damaged."""

    bundle: Bundle
    sources: Mapping[str, Source]
    certificate: Certificate
    skipped: tuple[str, ...] = ()


class Base(NamedTuple):
    """The base of an adapter: the folder's name where it lands, where it is now, its content."""

    name: str
    folder: Path
    content: str


@contextmanager
def gathered(
    run: Path, *, with_corpus: bool = True, with_base: bool = True, step: int | None = None,
    backend: str = "auto",
) -> Iterator[Cargo]:  # fmt: skip
    """A run's files as they travel, its lock held; see `pack` for arguments and errors."""
    opened = Run.open(run)
    with_corpora(with_paths_to(opened.config, run), run, None)  # or it raises
    with opened.lock():
        checkpoint = promised_checkpoint(opened, step=step, backend=backend)
        with closing(checkpoint):
            yield _cargo(opened, checkpoint, with_corpus=with_corpus, with_base=with_base)


def promised_checkpoint(run: Run, *, step: int | None = None, backend: str = "auto") -> Checkpoint:
    """The newest intact checkpoint of a run, or that of `step`, after its certificate was made to
    say what comes next, where it did not. The caller holds the lock."""
    checkpoint = _chosen(run, step)
    if checkpoint.certificate.continuation is not None:
        return checkpoint
    recorded = Recorded.of(run, checkpoint)
    prepared = prepare(with_paths_to(run.config, run.path), backend=backend, recorded=recorded)
    shape = prepared.shape
    streams = open_streams(prepared.config, batch_size=shape.batch_size, seq_len=shape.seq_len)
    with closing(open_session(prepared, streams, checkpoint).session) as session:
        give_references(prepared.config, streams, session, at_start=False)
        ahead = look_ahead(session, streams.train, checkpoint.step)
        environment = environment_of(prepared.backend, prepared.plan, session)
        if recorded.changes(environment):
            ahead = ahead.model_copy(update={"environment": lineage_entry(environment)})
        add_continuation(checkpoint.path, ahead)
    return open_checkpoint(checkpoint.path)


def _chosen(run: Run, step: int | None) -> Checkpoint:
    if step is not None:
        path = run.checkpoints / step_name(step)
        if not path.is_dir():
            raise ConfigError(
                f"{run.path} has no checkpoint of step {step}",
                fix=f"`solollm runs show {quoted(run.path)}` lists them",
            )
        return open_checkpoint(path)
    checkpoint, damaged = latest_checkpoint(run.checkpoints)
    if checkpoint is not None:
        return checkpoint
    if damaged:
        raise IntegrityError(f"no checkpoint of {run.path} is intact", why="; ".join(damaged))
    raise ConfigError(
        f"{run.path} has no checkpoint yet", fix="stop it by Ctrl-C: it is saved then"
    )


def _cargo(run: Run, checkpoint: Checkpoint, *, with_corpus: bool, with_base: bool) -> Cargo:
    name = run.path.resolve().name
    config = with_paths_to(run.config, run.path)
    corpora, base = _corpora(config), _base(config, checkpoint)
    _require_movable(name, *corpora)
    sources: dict[str, Source] = {}
    for corpus, path in corpora.items() if with_corpus else ():
        verify_corpus(path)
        sources |= _placed(f"corpora/{corpus}", path, _files_of(path))
    if base is not None and with_base:
        require_base(require_place(base.folder, run.path), base.content)
        sources |= _placed(f"models/{base.name}", base.folder, model_files(base.folder))
    if config.finetune is not None:
        samples = Path(config.data.corpus)
        sources |= _placed(f"runs/{name}/data", samples, sample_files(samples))
    place = f"runs/{name}"
    skipped = []
    for step in _steps_to_take(run, checkpoint):
        folder = run.checkpoints / step_name(step)
        try:
            files = list(_checkpoint_files(folder, is_proven=step == checkpoint.step))
        except IntegrityError as error:
            skipped.append(f"{folder.name}: {error}")
            continue
        sources |= {f"{place}/checkpoints/{folder.name}/{path.name}": path for path in files}
    for file_name in RUN_FILES:
        if file_name == "run.toml":
            sources[f"{place}/{file_name}"] = dump_config(_for_the_road(config, base)).encode()
        elif (run.path / file_name).exists():
            sources[f"{place}/{file_name}"] = run.path / file_name
    bundle = Bundle(
        run=name,
        step=checkpoint.step,
        corpora={corpus: read_index(path).fingerprint for corpus, path in corpora.items()},
        models={base.name: base.content} if base is not None else {},
        files={path: hash_source(source) for path, source in sources.items()},
    )
    return Cargo(seal(bundle), sources, checkpoint.certificate, tuple(skipped))


def _require_movable(*names: str) -> None:
    for name in names:
        if not is_movable(name):
            raise ConfigError(
                f"{name!r} cannot travel under this name",
                why="the folder of a run or corpus needs a plain ASCII name of at most 80"
                " characters, so that every file system takes it",
                fix="rename the folder",
            )


def _steps_to_take(run: Run, checkpoint: Checkpoint) -> list[int]:
    """The checkpoint's own step, and the best one's if it was kept."""
    best = checkpoint.state.best_step
    kept = best is not None and (run.checkpoints / step_name(best) / MANIFEST).exists()
    return sorted({checkpoint.step, best} if kept and best is not None else {checkpoint.step})


def _corpora(config: RunConfig) -> dict[str, Path]:
    """Name to folder of what the run reads; a second corpus of the same name gets another. The
    samples of a fine-tuning are the run's own."""
    if config.finetune is not None:
        return {}
    first, decay = Path(config.data.corpus), config.data.decay_corpus
    corpora = {first.name: first}
    if decay and Path(decay) != first:
        name = Path(decay).name
        corpora[name if name not in corpora else f"{name}-decay"] = Path(decay)
    return corpora


def _base(config: RunConfig, checkpoint: Checkpoint) -> Base | None:
    """The base of an adapter's run. Its name says its content, so that no two are ever taken for
    one another."""
    if checkpoint.adapter is None:
        return None
    folder, content = Path(config.train.init_from), checkpoint.adapter.base.content
    plain = folder.name
    if folder.parent.name == "checkpoints":
        plain = f"{folder.parent.parent.name}-{folder.name}"
    plain = _ODD.sub("-", plain).strip("-.")[:_PLAIN_LENGTH] or "base"
    return Base(f"{plain}-{content[:12]}", folder, content)


def _placed(place: str, folder: Path, files: Iterable[Path]) -> dict[str, Path]:
    """Files of a folder by where they land."""
    return {f"{place}/{file.relative_to(folder).as_posix()}": file for file in files}


def _for_the_road(config: RunConfig, base: Base | None) -> RunConfig:
    """The config with its paths as they are in a bundle. Starting weights stay behind, but for an
    adapter's base: a run that has a checkpoint never reads them again."""
    places = {str(path): f"../../corpora/{name}" for name, path in _corpora(config).items()}
    if config.finetune is not None:
        places[config.data.corpus] = "data"
    config = updated(config, "train", init_from=f"../../models/{base.name}" if base else "")
    return updated(
        config,
        "data",
        corpus=places[config.data.corpus],
        decay_corpus=places.get(config.data.decay_corpus, ""),
    )


def _files_of(corpus: Path) -> Iterator[Path]:
    """What a corpus needs to be read, its report, and what evaluations ask of it. What it left out
    stays behind."""
    index = read_index(corpus)
    yield corpus / INDEX_NAME
    for record in (REPORT_NAME, CANARIES_NAME, LOOKED_FOR_NAME):
        if (corpus / record).exists():
            yield corpus / record
    yield from sorted(path for path in (corpus / TOKENIZER_FOLDER).iterdir() if path.is_file())
    yield from corpus_files(corpus, index)


def _checkpoint_files(folder: Path, *, is_proven: bool) -> Iterator[Path]:
    """The files of an intact checkpoint; the certificate first, since it tells which tensor of a
    damaged file is the damaged one. Raises IntegrityError."""
    if not is_proven:
        open_checkpoint(folder).close()
    names = [CERTIFICATE, *sorted(set(read_manifest(folder).files) - {CERTIFICATE}), MANIFEST]
    yield from (folder / name for name in names)
