"""A checkpoint: one directory that is whole or absent, and proves every byte before it is used.

`docs/reference/checkpoint.md` is the format. Minus `optimizer.safetensors`, `trainer_state.json`,
`certificate.json` and `manifest.json` it is a plain Hugging Face model folder, or with an adapter
one of PEFT beside `base.json` (`solollm.frozen_base`). How bytes reach the disk is
`solollm.durable`'s, how tensors are laid out `solollm.tensorfile`'s; when to save and what to keep
is decided in `solollm.trainer`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from solollm import durable
from solollm.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE, AdapterOptions, trained_table
from solollm.architecture import ModelConfig
from solollm.backend import HostTensor, Snapshot, TensorSource
from solollm.certificate import Certificate, CertifiedSource, Continuation
from solollm.errors import BackendError, ConfigError, IntegrityError, StorageError
from solollm.frozen_base import BaseRecord, TrainedAdapter
from solollm.manifest import MANIFEST, Manifest, ManifestWriter, read_manifest, refuse_newer
from solollm.strictfile import parse_json, refused
from solollm.tensorfile import (
    FOR_TRANSFORMERS,
    INDEX,
    TensorFile,
    Weights,
    is_finite,
    open_weights,
    shard_index,
    split_shards,
)
from solollm.tensorheader import Spec, spec_bytes

SHARD_BYTES = 4_000_000_000
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
CERTIFICATE = "certificate.json"
_HEADROOM = 1.1
_STEP_NAME = re.compile(r"step-(\d{8,16})")
_Model = TypeVar("_Model", bound=BaseModel)
Verify = Literal["sizes", "weights", "digests"]  # see `open_checkpoint`


class _State(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataPosition(_State):
    """Where the data stream stands: batch `step` of (fingerprint, seed) comes next."""

    fingerprint: str
    seed: int
    step: int = Field(ge=0, le=2**53)


class Environment(_State):
    """What bitwise equality of a resumed run depends on."""

    backend: str
    device: str
    versions: dict[str, str] = {}
    micro_batch_size: int = Field(ge=1)
    compute_dtype: str
    world_size: int = Field(1, ge=1)
    activation_checkpointing: bool = False
    settings: dict[str, bool | int | float | str] = {}  # the session's own: threads, compile, ...


class TrainerState(_State):
    """All of a run at one step that is no tensor. `step` counts optimizer steps done."""

    format_version: Literal[1] = 1
    step: int = Field(ge=0, le=2**53)
    tokens_seen: int = Field(0, ge=0)
    session_state: dict[str, int | float] = {}
    data: DataPosition
    best_loss: float | None = None
    best_step: int | None = None
    elapsed_seconds: float = Field(0.0, ge=0)
    environment: Environment


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; its files stay open until it is dropped. With an `adapter` the
    parameters are the adapter's tensors, and `model` is that of its base."""

    path: Path
    step: int
    model: ModelConfig
    adapter: TrainedAdapter | None
    state: TrainerState
    certificate: Certificate
    _weights: Weights = field(repr=False)
    _optimizer: TensorFile = field(repr=False)
    _verified: Verify = field(repr=False)

    def parameters(self) -> TensorSource:
        """The weights, proven at opening or, after `verify="sizes"`, as each is read."""
        if self._verified != "sizes":
            return self._weights
        return CertifiedSource(self._weights, self.certificate.parameters, self.path)

    def optimizer(self) -> TensorSource:
        """The optimizer's tensors, likewise."""
        if self._verified == "digests":
            return self._optimizer
        return CertifiedSource(self._optimizer, self.certificate.optimizer, self.path)

    def close(self) -> None:
        """Close the files now."""
        self._weights.close()
        self._optimizer.close()


class CheckpointReport(NamedTuple):
    """What verification found; `problem` is empty for an intact checkpoint."""

    step: int
    path: Path
    problem: str


def save_checkpoint(
    parent: Path,
    *,
    model: ModelConfig,
    snapshot: Snapshot,
    state: TrainerState,
    tokenizer_files: Mapping[str, bytes],
    token_ids: Mapping[str, int],
    generation: Mapping[str, Any] | None = None,
    adapter: TrainedAdapter | None = None,
    continuation: Continuation | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Stream a snapshot into `parent/step-NNNNNNNN`, one tensor live; safe on any thread.

    When it returns, the checkpoint survives a power cut. One of the same step is replaced.
    `generation`: the content of `generation_config.json`; default: the token ids.

    Raises:
        StorageError: no room, or the disk fails; every earlier checkpoint is untouched.
        IntegrityError: a tensor holds NaN or infinity; nothing was saved.
        BackendError: the snapshot is not one of this model.
    """
    parameters, optimizer = list(snapshot.parameter_specs()), list(snapshot.optimizer_specs())
    options = adapter.options if adapter else None
    if {(name, tuple(shape)) for name, _, shape in parameters} != _expected(model, options):
        raise BackendError("the snapshot's tensors are not those of the model's name table")
    durable.make_directory(parent)
    tensor_bytes = sum(spec_bytes(dtype, shape) for _, dtype, shape in [*parameters, *optimizer])
    durable.require_space(parent, int(_HEADROOM * tensor_bytes))
    final = parent / step_name(state.step)
    dtype = "bfloat16" if all(dtype == "BF16" for _, dtype, _ in parameters) else "float32"
    with durable.staged_directory(final) as folder:
        files = ManifestWriter(folder)
        if adapter is None:
            files.add_json("config.json", model.to_hf(torch_dtype=dtype, **token_ids))
        else:
            for name, table in adapter.tables().items():
                files.add_json(name, table)
        files.add_json("generation_config.json", dict(generation or token_ids))
        for name, content in tokenizer_files.items():
            files.add(name, content)
        tensors = _finite(snapshot.parameters(), final)
        if adapter is None:
            weights = _write_weights(files, parameters, tensors, shard_bytes)
        else:
            weights = files.add_tensors(ADAPTER_WEIGHTS, parameters, tensors, FOR_TRANSFORMERS)
        moments = files.add_tensors(OPTIMIZER, optimizer, _finite(snapshot.optimizer(), final))
        files.add_json(STATE, state.model_dump(mode="json"))
        certificate = Certificate(
            step=state.step, parameters=weights, optimizer=moments, continuation=continuation
        )
        files.add_json(CERTIFICATE, certificate.model_dump(mode="json"))
        files.finish(step=state.step)
    return final


def add_continuation(path: Path, continuation: Continuation) -> None:
    """Put what comes next into the certificate of a finished checkpoint. The directory is replaced
    whole, by one that shares its tensor files: a crash leaves the one or the other.

    Raises:
        IntegrityError: the checkpoint's certificate or manifest is refused.
        StorageError: from the disk; the checkpoint is as it was.
    """
    manifest = read_manifest(path)
    certificate = _parse(Certificate, manifest.read(CERTIFICATE), path / CERTIFICATE)
    promising = certificate.model_copy(update={"continuation": continuation})
    with durable.staged_directory(path) as folder:
        files = ManifestWriter(folder)
        for name, entry in manifest.files.items():
            if name == CERTIFICATE:
                files.add_json(name, promising.model_dump(mode="json"))
            else:
                files.adopt(name, path / name, entry)
        files.finish(step=certificate.step)


def open_checkpoint(path: Path, verify: Verify = "digests") -> Checkpoint:
    """Open a checkpoint, proving all of it ("digests": one pass over the data), all but the
    optimizer's tensors ("weights"), or all but tensors ("sizes"). The rest is proven when read.

    Raises:
        IntegrityError: something is not as it was saved; names the file and the reason.
    """
    manifest = read_manifest(path)
    plain = [name for name, entry in manifest.files.items() if entry.digest.startswith("sha256:")]
    described = (BASE, ADAPTER_CONFIG) if BASE in manifest.files else ("config.json",)
    content = {name: manifest.read(name) for name in {*plain, *described, STATE, CERTIFICATE}}
    state = _parse(TrainerState, content[STATE], path / STATE)
    certificate = _parse(Certificate, content[CERTIFICATE], path / CERTIFICATE)
    step = manifest.facts.get("step")
    if type(step) is not int or not step == state.step == certificate.step:
        steps = f"{step}, {state.step} and {certificate.step}"
        raise refused(path / MANIFEST, "step", f"files of steps {steps} are mixed")
    model, adapter = _parse_model(content, path)
    optimizer = TensorFile(path / OPTIMIZER, follow_links=False)
    if adapter is None:
        weights = open_weights(path)
        check_parameters(weights, model)
    else:
        weights = Weights(path, [TensorFile(path / ADAPTER_WEIGHTS, follow_links=False)])
        check_parameters(weights, model, adapter.options)
    _prove(manifest, weights.files, certificate.parameters, verify != "sizes")
    _prove(manifest, [optimizer], certificate.optimizer, verify == "digests")
    return Checkpoint(path, step, model, adapter, state, certificate, weights, optimizer, verify)


def check_parameters(
    source: Weights | TensorFile, model: ModelConfig, adapter: AdapterOptions | None = None
) -> None:
    """Raise IntegrityError unless the names and shapes are exactly the name table of the model, or
    of this adapter of it."""
    expected = dict(_expected(model, adapter))
    place = source.folder if isinstance(source, Weights) else source.path
    for name in source.names():
        if name not in expected:
            raise refused(place, f"tensor {name!r}", "is not one of this model")
        shape, wanted = source.info(name).shape, expected.pop(name)
        if shape != wanted:
            raise refused(place, f"tensor {name!r}", f"has shape {shape}, the model {wanted}")
    if expected:
        raise refused(place, f"tensor {min(expected)!r}", "is missing")


def latest_checkpoint(
    parent: Path, verify: Verify = "digests"
) -> tuple[Checkpoint | None, list[str]]:
    """(the newest checkpoint that is proven intact, or None; what was skipped and why)."""
    skipped: list[str] = []
    for _, path in reversed(list_checkpoints(parent)):
        try:
            return open_checkpoint(path, verify), skipped
        except IntegrityError as error:
            skipped.append(f"skipped {path.name}: {error}")
    return None, skipped


def list_checkpoints(parent: Path) -> list[tuple[int, Path]]:
    """(step, path) of every directory that is named as a checkpoint, oldest first, unverified."""
    found = []
    for path in parent.iterdir() if parent.is_dir() else ():
        match = _STEP_NAME.fullmatch(path.name)
        if match and path.name == step_name(int(match[1])) and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def verify_checkpoints(parent: Path) -> list[CheckpointReport]:
    """Read every byte of every checkpoint, oldest first."""
    reports = []
    for step, path in list_checkpoints(parent):
        problem = ""
        try:
            open_checkpoint(path).close()
        except IntegrityError as error:
            problem = str(error)
        reports.append(CheckpointReport(step, path, problem))
    return reports


def prune(
    parent: Path, *, keep_latest: int, keep_steps: Collection[int] = (),
    passed_over: Collection[int] = (),
) -> list[str]:  # fmt: skip
    """Delete all but the latest finished checkpoints and those of `keep_steps`; unfinished ones go
    too. Damaged ones, `passed_over`, do not count, and go when a later one is there. Returns what
    could not be deleted, and why: one failure never stops the rest."""
    assert keep_latest >= 1, keep_latest
    found = list_checkpoints(parent)
    finished = [s for s, path in found if s not in passed_over and (path / MANIFEST).exists()]
    kept = {*finished[-keep_latest:], *(set(keep_steps) & set(finished))}
    kept |= {step for step in passed_over if step > max(finished, default=0)}
    failures: list[str] = []
    for step, path in found:
        try:
            if step not in kept:
                durable.remove_tree(path)
        except StorageError as error:
            failures.append(f"{path.name} is still there: {error}")
    return failures


def step_name(step: int) -> str:
    """The directory name of a step."""
    return f"step-{step:08d}"


def _expected(
    model: ModelConfig, adapter: AdapterOptions | None
) -> set[tuple[str, tuple[int, ...]]]:
    return {(spec.name, spec.shape) for spec in trained_table(model, adapter)}


def _finite(
    tensors: Iterator[tuple[str, HostTensor]], final: Path
) -> Iterator[tuple[str, HostTensor]]:
    for name, tensor in tensors:
        if not is_finite(tensor):
            fix = "resume from an earlier checkpoint, with a lower learning rate"
            raise refused(final, f"tensor {name!r}", "holds NaN or infinity: not saved", fix=fix)
        yield name, tensor


def _write_weights(
    files: ManifestWriter,
    specs: Sequence[Spec],
    tensors: Iterator[tuple[str, HostTensor]],
    shard_bytes: int,
) -> dict[str, str]:
    shards = split_shards(specs, shard_bytes)
    digests: dict[str, str] = {}
    for name, shard in shards.items():
        part = tensors if len(shards) == 1 else islice(tensors, len(shard))
        digests |= files.add_tensors(name, shard, part, FOR_TRANSFORMERS)
    if len(shards) > 1:
        files.add_json(INDEX, shard_index(shards))
    return digests


def _prove(
    manifest: Manifest,
    files: Sequence[TensorFile],
    certified: Mapping[str, str],
    is_read: bool,
) -> None:
    names: set[str] = set()
    for file in files:
        manifest.check_tensors(file, certified)
        names.update(file.names())
        digests = file.digests() if is_read else {}
        wrong = [name for name, digest in digests.items() if digest != certified[name]]
        if wrong:
            raise refused(file.path, f"tensor {wrong[0]!r}", "is damaged (its digest differs)")
    missing = sorted(set(certified) - names)
    if missing:
        raise refused(manifest.folder, f"tensor {missing[0]!r}", "is certified but missing")


def _parse(kind: type[_Model], content: bytes, path: Path) -> _Model:
    table = _table(content, path)
    refuse_newer(table, path)
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        raise refused(path, ".".join(map(str, first["loc"])), first["msg"]) from error


def _parse_model(
    content: Mapping[str, bytes], path: Path
) -> tuple[ModelConfig, TrainedAdapter | None]:
    """The model of `config.json`, or of `base.json` with the adapter beside it."""
    name = BASE if BASE in content else "config.json"
    try:
        if name != BASE:
            return ModelConfig.from_hf(_table(content[name], path / name)), None
        base = _parse(BaseRecord, content[BASE], path / BASE)
        peft = _table(content[ADAPTER_CONFIG], path / ADAPTER_CONFIG)
        return base.model, TrainedAdapter.read(peft, base)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise refused(path / name, "the model", str(error)) from error


def _table(content: bytes, path: Path) -> dict[str, Any]:
    table = parse_json(content, path)
    if not isinstance(table, dict):
        raise refused(path, "the JSON text", "is no table")
    return table
