"""Text in, text out: a checkpoint with its tokenizer on an engine, and completing prompts with it.

Token ids and batches of requests are `solollm.generation`'s; conversations `solollm.dialogue`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from solollm.backend import Backend, Engine, EngineOptions, Request, SamplingParams, TokenEvent
from solollm.bases import find_base, is_adapter
from solollm.checkpoint import latest_checkpoint
from solollm.errors import ConfigError
from solollm.generation import Completion, completion, stream
from solollm.registry import select_backend
from solollm.strictfile import parse_json, read_bytes
from solollm.tokenizer import Tokenizer

DEFAULT_SAMPLING = SamplingParams(temperature=0.8, top_p=0.95)
DEFAULT_NEW_TOKENS = 256
TUNED = "tuned"  # an adapter run's own adapter, by name


@dataclass(frozen=True)
class TextModel:
    """A model that can be asked for text.

    Attributes:
        checkpoint: the folder it was read from.
        is_chat: tuned to answer: its `generation_config.json` ends generation at the end of a turn.
        stop_ids: what ends a generation.
        notes: what a user should hear: the backend taken, damaged checkpoints that were passed.
    """

    engine: Engine
    tokenizer: Tokenizer
    checkpoint: Path
    is_chat: bool
    stop_ids: frozenset[int]
    notes: tuple[str, ...] = ()

    @property
    def max_seq_len(self) -> int:
        return self.engine.options.max_seq_len or self.engine.model.max_position_embeddings


@dataclass(frozen=True)
class TextCompletion:
    """`text` continues the prompt; `tokens` says with which ids and why it ended."""

    text: str
    tokens: Completion


@dataclass(frozen=True)
class TextSide:
    """What is known of a model without its weights; fields as in `TextModel`."""

    checkpoint: Path
    tokenizer: Tokenizer
    is_chat: bool
    stop_ids: frozenset[int]
    notes: tuple[str, ...] = ()


def read_text_side(path: Path) -> TextSide:
    """The tokenizer and endings of a run folder or checkpoint folder; errors as in `open_model`."""
    return text_side(*find_checkpoint(path))


def text_side(checkpoint: Path, notes: tuple[str, ...] = ()) -> TextSide:
    """The same of a folder that is known to be a checkpoint."""
    if not (checkpoint / "tokenizer.json").is_file():
        raise ConfigError(
            f"{checkpoint} holds no tokenizer",
            why="without its tokenizer.json a model knows no text",
            fix="copy the files of the tokenizer it was trained with into that folder",
        )
    tokenizer = Tokenizer.load(checkpoint)
    ends = generation_ends(checkpoint)
    is_chat = tokenizer.end_id in ends and tokenizer.has_chat_template
    return TextSide(checkpoint, tokenizer, is_chat, tokenizer.stop_ids | ends, notes)


def open_model(
    path: Path,
    *,
    backend: str = "auto",
    options: EngineOptions | None = None,
    base: Path | None = None,
) -> TextModel:
    """The model of a run folder (its newest intact checkpoint) or of a checkpoint folder. `base`:
    where an adapter's base lies, if not where its run says.

    Raises:
        ConfigError: no checkpoint or no tokenizer there, or a model that is not computed here.
        IntegrityError: damaged files.
        BackendError: no backend can run here.
    """
    side = read_text_side(path)
    selected = select_backend(backend)
    options = replace(
        options or EngineOptions(max_batch_size=1), vocab_size=side.tokenizer.vocab_size
    )
    return TextModel(
        engine=open_engine(selected.backend, side.checkpoint, options, base=base),
        tokenizer=side.tokenizer,
        checkpoint=side.checkpoint,
        is_chat=side.is_chat,
        stop_ids=side.stop_ids,
        notes=(*side.notes, selected.reason),
    )


def open_engine(
    backend: Backend, checkpoint: Path, options: EngineOptions, *, base: Path | None = None
) -> Engine:
    """An engine over a checkpoint; over an adapter's, its base with the adapter as the default.

    Raises:
        ConfigError, IntegrityError: as `find_base`, and from the engine.
    """
    if not is_adapter(checkpoint):
        return backend.engine(checkpoint, options)
    if TUNED in options.adapters:
        raise ConfigError(
            f"the name {TUNED!r} is taken", why="an adapter's run has its own adapter under it",
            fix="give the other adapter another name",
        )  # fmt: skip
    adapters = {**options.adapters, TUNED: checkpoint}
    default = options.adapter or TUNED
    return backend.engine(
        find_base(checkpoint, base), replace(options, adapters=adapters, adapter=default)
    )


def find_checkpoint(path: Path) -> tuple[Path, tuple[str, ...]]:
    """(the checkpoint folder that `path` means, notes on damaged ones that were passed over)."""
    if (path / "config.json").is_file() or is_adapter(path):
        return path, ()
    newest, skipped = latest_checkpoint(path / "checkpoints", verify="weights")
    if newest is None:
        raise ConfigError(
            f"{path} is neither a run with a checkpoint nor a checkpoint",
            why="; ".join(skipped) or "there is no config.json and no checkpoints/step-* in it",
            fix="`solollm runs list` shows the runs there are",
        )
    return newest.path, tuple(skipped)


def stream_text(
    model: TextModel,
    prompt: str,
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    sampling: SamplingParams = DEFAULT_SAMPLING,
) -> Iterator[tuple[str, TokenEvent]]:
    """The continuation of `prompt`, token by token: the characters that each completes (often '')
    and its event. Closing the iterator stops the generation.

    Raises:
        ConfigError: an empty prompt, one that does not fit, a sampling value out of range.
    """
    ids = prompt_ids(model, prompt)
    request = Request(ids, max_new_tokens, sampling, model.stop_ids)
    return decoded(model.tokenizer, stream(model.engine, request))


def generate_text(
    model: TextModel,
    prompt: str,
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    sampling: SamplingParams = DEFAULT_SAMPLING,
) -> TextCompletion:
    """The whole continuation of `prompt`; arguments and errors are those of `stream_text`."""
    pieces = list(stream_text(model, prompt, max_new_tokens=max_new_tokens, sampling=sampling))
    text = "".join(piece for piece, _ in pieces)
    return TextCompletion(text, completion(event for _, event in pieces))


def prompt_ids(model: TextModel, prompt: str) -> list[int]:
    """A document's beginning as token ids: bos, then the text."""
    if not prompt:
        raise ConfigError("the prompt is empty", fix="give a text to continue, if only one word")
    return [model.tokenizer.bos_id, *model.tokenizer.encode(prompt)]


def decoded(tokenizer: Tokenizer, events: Iterator[TokenEvent]) -> Iterator[tuple[str, TokenEvent]]:
    """Each event with the characters that it completes; special tokens give none."""
    decoder = tokenizer.stream()
    for event in events:
        text = decoder.push(event.token) if event.token >= 0 else ""
        if event.finish_reason is not None:
            text += decoder.finish()
        yield text, event


def generation_ends(checkpoint: Path) -> frozenset[int]:
    """The eos ids of `generation_config.json`, which may be one, several or none."""
    path = checkpoint / "generation_config.json"
    if not path.is_file():
        return frozenset()
    config = parse_json(read_bytes(path), path)
    ends = config.get("eos_token_id") if isinstance(config, dict) else None
    listed: Sequence[object] = ends if isinstance(ends, list) else [ends]
    return frozenset(end for end in listed if isinstance(end, int))
