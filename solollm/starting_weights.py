"""`--init-from`: the weights of another checkpoint, vetted before a run starts from them.

Only weights are taken: the optimizer starts anew and the learning rate warms up again. Continuing a
run with its optimizer is `resume`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from solollm.adapters import BASE, AdapterOptions, codec_of
from solollm.architecture import ModelConfig
from solollm.backend import Backend, TensorSource, TrainSession
from solollm.config import ModelTable
from solollm.errors import ConfigError, IntegrityError, quoted
from solollm.frozen_base import (
    BaseRecord,
    BaseSource,
    TrainedAdapter,
    require_content,
)
from solollm.model_folder import read_origin
from solollm.strictfile import parse_json, read_bytes
from solollm.tensorfile import open_weights
from solollm.tokenizer import Tokenizer


@dataclass(frozen=True)
class StartingWeights:
    """A model folder: a checkpoint of ours, or any Llama-style folder with our tokenizer."""

    path: Path
    model: ModelConfig

    def model_for(self, table: ModelTable) -> ModelConfig:
        """The folder's model. Raises ConfigError where the config asks for another."""
        asked = [name for name, value in table if value is not None and value != self.model]
        if asked:
            raise ConfigError(
                f"the model of {self.path} is fixed, but the config sets {', '.join(asked)}",
                why="--init-from takes the model together with its weights",
                fix="leave the model's settings out, or train from scratch without --init-from",
            )
        return self.model

    def parameters(self) -> TensorSource:
        return open_weights(self.path)


def read_starting_weights(folder: Path, tokenizer: Tokenizer) -> StartingWeights:
    """Read a model folder's configuration and compare its tokenizer with the corpus's.

    Raises:
        ConfigError: not a model folder, or ids that mean other tokens than the corpus's ids.
        IntegrityError: damaged files.
    """
    config_path = folder / "config.json"
    if (folder / BASE).is_file():
        raise ConfigError(
            f"{folder} holds an adapter, not a whole model",
            why="a run starts from whole weights",
            fix=f"solollm export {quoted(folder)} --to hf --merge --out models/NAME, then that",
        )
    if not config_path.is_file():
        raise ConfigError(
            f"{folder} holds no config.json",
            why="--init-from wants a checkpoint or model folder",
            fix="give a folder such as runs/NAME/checkpoints/step-00001000",
        )
    model = ModelConfig.from_hf(parse_json(read_bytes(config_path), config_path))
    if model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"the model of {folder} has {model.vocab_size} ids, the corpus's tokenizer"
            f" {tokenizer.vocab_size}",
            fix=f"build the corpus with that model's tokenizer: --tokenizer {folder}",
        )
    theirs = Tokenizer.load(folder)
    if theirs.digest != tokenizer.digest and not _same_ids(theirs, tokenizer):
        raise ConfigError(
            f"the tokenizer of {folder} ({theirs.digest[:12]}) is not the corpus's"
            f" ({tokenizer.digest[:12]})",
            why="the same id would mean another token",
            fix=f"build the corpus with that model's tokenizer: --tokenizer {folder}",
        )
    return StartingWeights(folder, model)


def bring_base(
    session: TrainSession, weights: StartingWeights, options: AdapterOptions, backend: Backend
) -> TrainedAdapter:
    """Give an adapter session its base, in one pass over the files; says which one it was.

    Raises:
        IntegrityError: damaged weights, or not those of the model.
    """
    source = BaseSource(weights.parameters())
    session.import_base(source)
    origin = read_origin(weights.path)
    codec = codec_of(backend.capabilities().adapters) if options.base_bits else ""
    record = {
        "content": source.content(),
        "hub_id": origin.name if origin and "/" in origin.name else "",  # else a folder's name
        "codec": codec,
        "seed": options.seed,
        "config": weights.model.to_hf(),
    }
    return TrainedAdapter(options, BaseRecord.model_validate(record))


def require_same_base(found: TrainedAdapter, expected: TrainedAdapter | None, place: Path) -> None:
    """Raise IntegrityError unless the base is the one that a checkpoint's adapter was made on."""
    if expected is None:
        raise IntegrityError(
            "the checkpoint holds a whole model, the run's settings train an adapter",
            why="run.toml was changed, or the checkpoint is another run's",
            fix="restore the run's own run.toml",
        )
    require_content(found.base.content, expected.base.content, str(place))


def _same_ids(first: Tokenizer, second: Tokenizer) -> bool:
    if first.vocab_size != second.vocab_size:
        return False
    return all(first.token_bytes(i) == second.token_bytes(i) for i in range(first.vocab_size))
