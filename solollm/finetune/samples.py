"""Token samples of a fine-tuning, and their place in a run: `runs/<name>/data/`.

Rows are read, laid out and encoded once, before a run starts; from then on the run needs neither
their files nor the template, and can move as a whole.

    data/train.safetensors  held_out.safetensors  tokenizer/  samples.json
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from solollm import durable
from solollm.backend import HostTensor
from solollm.errors import ConfigError
from solollm.finetune.rendering import Rendered
from solollm.strictfile import encode_json, parse_json, read_bytes, refused
from solollm.tensorfile import TensorFile, tensor_digest, write_tensors
from solollm.tokenizer import Tokenizer

INDEX, TOKENIZER_FOLDER = "samples.json", "tokenizer"
SampleSplit = Literal["train", "held_out"]


class Samples(NamedTuple):
    """Conversations end to end. `starts` int64 [S + 1]: where each begins in `tokens` int32 [N] and
    `produced` bool [N]. `group`: how many neighbours belong together (2: chosen and rejected)."""

    tokens: np.ndarray
    produced: np.ndarray
    starts: np.ndarray
    group: int = 1

    @classmethod
    def of(cls, rendered: Sequence[Rendered], *, group: int = 1) -> Samples:
        starts = np.cumsum([0, *(len(one.ids) for one in rendered)], dtype=np.int64)
        empty = [Rendered(np.zeros(0, np.int32), np.zeros(0, bool))]
        parts = [*rendered, *empty]
        return cls(
            np.concatenate([one.ids for one in parts]),
            np.concatenate([one.produced for one in parts]),
            starts,
            group,
        )

    @property
    def num_samples(self) -> int:
        return len(self.starts) - 1

    @property
    def num_positions(self) -> np.ndarray:
        """int64 [S]: positions that each takes in a row; its last token is only a label."""
        return np.diff(self.starts) - 1

    @property
    def num_targets(self) -> int:
        """Tokens that are learnt: what the assistant produces, but for a first token."""
        is_target = self.produced.copy()
        is_target[self.starts[:-1]] = False
        return int(is_target.sum())

    def sample(self, index: int) -> Rendered:
        place = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return Rendered(self.tokens[place], self.produced[place])

    def tensors(self) -> dict[str, HostTensor]:
        return {
            "tokens": HostTensor.of(self.tokens.astype(np.int32)),
            "produced": HostTensor.of(self.produced.astype(np.uint8)),
            "starts": HostTensor("U32", self.starts.shape, self.starts.astype(np.uint32)),
        }


class SplitRecord(BaseModel):
    """`text_bytes`: UTF-8 bytes of what is learnt, so that losses become bits per byte."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(ge=0)
    group: Literal[1, 2]
    text_bytes: int = Field(ge=0)
    digest: str


class SamplesIndex(BaseModel):
    """`samples.json`. `sources` say where the rows came from, for people."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    tokenizer_digest: str
    splits: dict[str, SplitRecord]
    shapes: dict[str, int] = {}
    sources: list[str] = []

    @property
    def fingerprint(self) -> str:
        """Of everything that decides batches."""
        described = [self.tokenizer_digest]
        described += [f"{name}={record.digest}" for name, record in sorted(self.splits.items())]
        return hashlib.blake2b("/".join(described).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class SampleSet:
    """All samples of a run."""

    tokenizer: Tokenizer
    train: Samples
    held_out: Samples
    index: SamplesIndex

    @classmethod
    def of(cls, tokenizer: Tokenizer, train: Samples, held_out: Samples, **about: Any) -> SampleSet:
        splits = {
            name: SplitRecord(
                samples=samples.num_samples,
                group=samples.group,
                text_bytes=_text_bytes(tokenizer, samples),
                digest=_digest(samples),
            )
            for name, samples in (("train", train), ("held_out", held_out))
        }
        index = SamplesIndex(tokenizer_digest=tokenizer.digest, splits=splits, **about)
        return cls(tokenizer, train, held_out, index)

    def split(self, name: SampleSplit) -> Samples:
        return self.train if name == "train" else self.held_out

    def save(self, folder: Path) -> None:
        """Write `folder`, whole or not at all. Raises StorageError."""
        with durable.staged_directory(folder) as staged:
            for name in ("train", "held_out"):
                tensors = self.split(name).tensors()
                specs = [(key, tensor.dtype, tensor.shape) for key, tensor in tensors.items()]
                write_tensors(staged / f"{name}.safetensors", specs, tensors.items())
            files = {f"{TOKENIZER_FOLDER}/{n}": c for n, c in self.tokenizer.files().items()}
            files[INDEX] = encode_json(self.index.model_dump(mode="json"))
            (staged / TOKENIZER_FOLDER).mkdir()
            for name, content in files.items():
                with durable.create_file(staged / name, expected_bytes=len(content)) as file:
                    file.write(content)


def read_index(folder: Path) -> SamplesIndex:
    """The index of a run's samples. Raises ConfigError where there are none, IntegrityError."""
    path = folder / INDEX
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no samples",
            why=f"there is no {INDEX} in it",
            fix="`solollm finetune` writes them into its run's folder",
        )
    try:
        return SamplesIndex.model_validate(parse_json(read_bytes(path), path))
    except ValidationError as error:
        first = error.errors()[0]
        raise refused(path, ".".join(map(str, first["loc"])), first["msg"]) from error


def sample_files(folder: Path) -> list[Path]:
    """Every file of a run's samples: what a run that moves takes along. Proves them first; raises
    as `read_samples`."""
    read_samples(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def tokenizer_of_samples(folder: Path) -> Tokenizer:
    """The tokenizer that a run's samples are made with. Raises ConfigError, IntegrityError."""
    index = read_index(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER_FOLDER)
    if tokenizer.digest != index.tokenizer_digest:
        raise refused(folder / TOKENIZER_FOLDER, "tokenizer.json", "is not the samples' own")
    return tokenizer


def read_samples(folder: Path) -> SampleSet:
    """Read and prove a run's samples. Raises ConfigError, IntegrityError."""
    tokenizer, index = tokenizer_of_samples(folder), read_index(folder)
    train, held_out = (_read(folder, index, name) for name in ("train", "held_out"))
    return SampleSet(tokenizer, train, held_out, index)


def _read(folder: Path, index: SamplesIndex, name: str) -> Samples:
    path = folder / f"{name}.safetensors"
    record = index.splits.get(name)
    with TensorFile(path, follow_links=False) as file:
        arrays = {key: file.read(key).data for key in ("tokens", "produced", "starts")}
    if record is None:
        raise refused(folder / INDEX, "splits", f"{name} is missing")
    samples = Samples(
        arrays["tokens"], arrays["produced"].astype(bool), arrays["starts"].astype(np.int64),
        record.group,
    )  # fmt: skip
    if _digest(samples) != record.digest:
        raise refused(path, "content", f"is not what {INDEX} promised (digest differs)")
    return samples


def _digest(samples: Samples) -> str:
    parts = [tensor_digest(tensor) for tensor in samples.tensors().values()]
    return hashlib.sha256(f"{samples.group}/{'/'.join(parts)}".encode()).hexdigest()


def _text_bytes(tokenizer: Tokenizer, samples: Samples) -> int:
    special = set(tokenizer.special_tokens.values())
    ids, counts = np.unique(samples.tokens[samples.produced], return_counts=True)
    pairs = zip(ids.tolist(), counts.tolist(), strict=True)
    return sum(len(tokenizer.token_bytes(i)) * n for i, n in pairs if i not in special)
