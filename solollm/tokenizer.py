"""Text to token ids and back: byte-level BPE with one fixed pre-tokenizer.

Every digit stands alone, then GPT-2's regular expression splits (llama.cpp's `smollm`). The 256
bytes are always in the vocabulary, so every text has ids and decodes back to itself; special
tokens have the first ids and are never read out of text, so no user can forge a role.

Where tokenizers are made: `tokenizer_training`. Which files are let in: `tokenizer_format`. How a
corpus is encoded fast: `fast_encoding`. How conversations are laid out: `chat_template`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from solollm.chat_template import ROLES, TEMPLATE, ChatTemplate, Message
from solollm.confined import Confined
from solollm.errors import ConfigError, DataError, IntegrityError
from solollm.fast_encoding import FastEncoder, is_faithful
from solollm.strictfile import parse_json, read_bytes
from solollm.tokenizer_format import TokenizerFormat, byte_alphabet, read_format

TOKENIZER, CONFIG, CHAT_TEMPLATE = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES), END)
PADDING_MULTIPLE = 64
_TURN_ENDS = (END, "<|eot_id|>", "<|im_end|>")
_FAST_AFTER_CHARS = 1 << 18  # learning the character classes costs as much as this much text
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A tokenizer, fixed by its files. `load` reads a folder, `train_tokenizer` makes a new one.

    `vocab_size` counts the real tokens; `padded_vocab_size` the rows of an embedding.

    Raises:
        IntegrityError: a file that is missing, damaged, hostile or of a layout not known here.
    """

    def __init__(self, files: Mapping[str, bytes], *, source: Path = Path()) -> None:
        for name in (TOKENIZER, CONFIG):
            if name not in files:
                raise IntegrityError(f"{source / name} is missing", why="a tokenizer needs it")
        self._files = {name: bytes(content) for name, content in files.items()}
        layout = read_format(self._files[TOKENIZER], source / TOKENIZER)
        config = parse_json(self._files[CONFIG], source / CONFIG)
        if not isinstance(config, dict):
            raise IntegrityError(f"{source / CONFIG} is not a JSON object")
        self._special = dict(layout.special)
        self._special_ids = frozenset(self._special.values())
        self._token_bytes = _token_bytes(layout)
        self.vocab_size = len(self._token_bytes)
        self._name_specials(config, source / CONFIG)
        self._template = self._chat_template(config, source / CHAT_TEMPLATE)
        self._plain = _load_plain(layout, source / TOKENIZER)
        self._fast = FastEncoder(self._plain) if layout.is_own else None
        self._slow_chars = _FAST_AFTER_CHARS

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer's files, our own or a foreign model's."""
        folder = Path(folder)
        names = [n for n in (TOKENIZER, CONFIG, CHAT_TEMPLATE) if (folder / n).exists()]
        return cls({name: read_bytes(folder / name) for name in names}, source=folder)

    def save(self, folder: str | Path) -> None:
        """Write the files into `folder`, made where absent."""
        from solollm.durable import replace_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            replace_file(Path(folder) / name, content)

    def files(self) -> dict[str, bytes]:
        """File name -> content: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
        return dict(self._files)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 64. The rows above
        `vocab_size` stand for no token: `encode` never gives their ids, `decode` refuses them."""
        return -(-self.vocab_size // PADDING_MULTIPLE) * PADDING_MULTIPLE

    @property
    def token_ids(self) -> dict[str, int]:
        """The special ids under the names that config.json gives them."""
        return {
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id,
            "pad_token_id": self.pad_id,
        }

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generation: the end of the document and the end of a turn."""
        return frozenset((self.eos_id, self.end_id))

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of every special token."""
        return dict(self._special)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of tokenizer.json, in hex: equal digests give equal ids for every text."""
        return hashlib.sha256(self._files[TOKENIZER]).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Nothing is added; the text of a special token stays text.

        Raises:
            DataError: the text holds a lone surrogate, which no UTF-8 file can.
        """
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for many texts: one uint32 array [tokens] each."""
        try:
            if self._fast is not None and self._pays(texts):
                return [self._fast.encode(text) for text in texts]
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError(
                "a text cannot be encoded",
                why=_unencodable(texts) or str(error),
                fix="give text in UTF-8, or read it with errors='replace'",
            ) from error
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id outside the vocabulary.
        """
        skipped = self._special_ids if skip_special else ()
        return b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for. Raises DataError outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise DataError(
                f"token id {token_id} is outside the vocabulary of {self.vocab_size}",
                why="ids above it are padding rows of the embedding and stand for no text",
                fix="use the tokenizer that the model was trained with",
            )
        return self._token_bytes[token_id]

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that is fed ids one by one."""
        return StreamDecoder(self, skip_special=skip_special)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation. Only the template's own markers become special tokens;
        a marker typed inside a message is encoded as the text that it is.

        Raises:
            ConfigError: a malformed message, or a tokenizer without a chat template.
        """
        return self.encode_chat(messages, add_generation_prompt)[0]

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether the assistant has to produce it."""
        ids: list[int] = []
        produced: list[bool] = []
        for part in self.chat_template.parts(
            messages, add_generation_prompt, self._special, tools=tools
        ):
            new = [self._special[part.text]] if part.is_special else self.encode(part.text)
            ids += new
            produced += [part.is_produced] * len(new)
        return ids, produced

    @property
    def has_chat_template(self) -> bool:
        """Whether the files say how conversations are laid out."""
        return self._template is not None

    @property
    def chat_template(self) -> ChatTemplate:
        """How conversations are laid out. Raises ConfigError if the files hold no template."""
        if self._template is None:
            raise ConfigError(
                "this tokenizer has no chat template",
                why="it belongs to a base model, which only continues text",
                fix="use `solollm generate`, or add a chat_template.jinja beside tokenizer.json",
            )
        return self._template

    def _pays(self, texts: Sequence[str]) -> bool:
        """Whether enough text has come by to be worth the fast encoder's start."""
        if self._slow_chars > 0:
            self._slow_chars -= sum(map(len, texts))
        return self._slow_chars <= 0 and is_faithful()

    def _name_specials(self, config: Mapping[str, Any], path: Path) -> None:
        """Set `bos_id`, `eos_id`, `pad_id` and `end_id`; what a foreign tokenizer lacks is its
        end of text."""

        def named(key: str) -> int | None:
            value = config.get(key)
            token = value.get("content") if isinstance(value, dict) else value
            if token is None:
                return None
            if token not in self._special:
                raise IntegrityError(
                    f"{path}: `{key}` is {token!r:.40}",
                    why="tokenizer.json has no such special token",
                )
            return self._special[token]

        eos = named("eos_token")
        if eos is None:
            raise IntegrityError(f"{path} names no `eos_token`", why="text would never end")
        bos, pad = named("bos_token"), named("pad_token")
        self.eos_id = eos
        self.bos_id = eos if bos is None else bos
        self.pad_id = eos if pad is None else pad
        self.end_id = next((self._special[t] for t in _TURN_ENDS if t in self._special), eos)

    def _chat_template(self, config: Mapping[str, Any], path: Path) -> ChatTemplate | None:
        source = config.get("chat_template")
        if CHAT_TEMPLATE in self._files:
            try:
                source = self._files[CHAT_TEMPLATE].decode()
            except UnicodeDecodeError as error:
                raise IntegrityError(f"{path} is not UTF-8", why=str(error)) from error
        if not isinstance(source, str):
            return None
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        names = {name: self._token_bytes[i].decode() for name, i in ids.items()}
        return ChatTemplate(source, names)


def _unencodable(texts: Sequence[str]) -> str:
    """Where the first text has no UTF-8, in words; empty where it is something else."""
    for text in texts:
        found = _SURROGATE.search(text) if isinstance(text, str) else None
        if found:
            place = found.start() + 1
            return f"its character {place:,} is {found.group()!a}, a lone surrogate: not text"
    return ""


class StreamDecoder:
    """Text of a growing token sequence; never emits half a UTF-8 character.

    The concatenation of all that `push` and `finish` return equals `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_tokens.values()
        self._skipped = frozenset(special if skip_special else ())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes; often one token's text, sometimes ''."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD if the tokens ended inside a character, else ''."""
        return self._utf8.decode(b"", final=True)


def config_bytes(special: Sequence[str]) -> bytes:
    """The tokenizer_config.json that belongs to these special tokens, as transformers reads it."""
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [t for t in special if t not in (BOS, EOS, PAD)],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    return json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"


def _token_bytes(layout: TokenizerFormat) -> list[bytes]:
    """The bytes of each id; an id that no token has stands for nothing."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    last = max((*layout.vocabulary.values(), *layout.added.values()))
    table = [b""] * (last + 1)
    for token, token_id in layout.vocabulary.items():
        if token not in layout.added:
            table[token_id] = bytes(byte_of[letter] for letter in token)
    for token, token_id in layout.added.items():
        table[token_id] = token.encode()
    return table


def _load_plain(layout: TokenizerFormat, path: Path) -> Any:
    """The `tokenizers` object; a foreign file is tried out in a child process first.

    Raises:
        IntegrityError: the library refuses the file, or dies of it.
    """
    from tokenizers import Tokenizer as PlainTokenizer

    if not layout.is_own:
        with Confined("solollm.tokenizer_format:try_load", seconds=20) as child:
            child.ask(layout.safe_json)
    try:
        plain = PlainTokenizer.from_str(layout.safe_json)
    except BaseException as error:  # its panics are no Exceptions
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise IntegrityError(f"{path} cannot be loaded", why=f"{error}") from error
    plain.encode_special_tokens = True
    return plain
