"""Text to token ids and back: byte-level BPE with one fixed pre-tokenizer.

Every digit stands alone, then GPT-2's regular expression splits (llama.cpp's `smollm`). The 256
bytes are always in the vocabulary, so every text has ids and decodes back to itself; special
tokens have the first ids and are never read out of text, so no user can forge a role.
Where tokenizers are made: `tokenizer_training`. How conversations are laid out: `chat_template`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from solollm.chat_template import ChatTemplate, Message
from solollm.errors import DataError, IntegrityError

FILE_NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>")
SPECIAL_TOKENS = (BOS, EOS, PAD, *ROLE_TOKENS, END)
PADDING_MULTIPLE = 64


class Tokenizer:
    """An immutable tokenizer, made from its files. `load` reads a folder."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        from tokenizers import Tokenizer as PlainTokenizer

        missing = [name for name in FILE_NAMES if name not in files]
        if missing:
            raise IntegrityError(f"the tokenizer lacks {', '.join(missing)}")
        self._files = {name: bytes(files[name]) for name in FILE_NAMES}
        self._plain = PlainTokenizer.from_str(self._files["tokenizer.json"].decode())
        self._plain.encode_special_tokens = True
        content = json.loads(self._files["tokenizer.json"])
        self._special = {t["content"]: int(t["id"]) for t in content["added_tokens"]}
        self._token_bytes = _token_bytes(content["model"]["vocab"], self._special)
        self.vocab_size = len(self._token_bytes)
        names = json.loads(self._files["tokenizer_config.json"])
        self.bos_id = self._special[names["bos_token"]]
        self.eos_id = self._special[names["eos_token"]]
        self.pad_id = self._special[names["pad_token"]]
        self.end_id = self._special[END]
        self._special_ids = frozenset(self._special.values())
        self._template = ChatTemplate(
            self._files["chat_template.jinja"].decode(),
            {name: names[name] for name in ("bos_token", "eos_token", "pad_token")},
        )

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer's three files. Raises IntegrityError where one is missing or bad."""
        files = {}
        for name in FILE_NAMES:
            try:
                files[name] = (Path(folder) / name).read_bytes()
            except OSError as error:
                raise IntegrityError(
                    f"cannot read {Path(folder) / name}", why=error.strerror or ""
                ) from error
        return cls(files)

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
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 64."""
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
        """Ids that end a generation: end of document and end of a turn."""
        return frozenset((self.eos_id, self.end_id))

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of every special token."""
        return dict(self._special)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of tokenizer.json: equal digests give equal ids for every text."""
        return hashlib.sha256(self._files["tokenizer.json"]).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Nothing is added; the text of a special token stays text."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for many texts, one uint32 array [tokens] each.

        Raises:
            DataError: a text holds lone surrogates, which no UTF-8 file can.
        """
        try:
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise DataError("a text is not valid Unicode", why=str(error)) from error
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: an id outside the vocabulary.
        """
        return b"".join(
            self.token_bytes(i) for i in ids if not (skip_special and int(i) in self._special_ids)
        ).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for. Raises DataError outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise DataError(
                f"token id {token_id} is outside the vocabulary of {self.vocab_size}",
                why="ids above it are padding rows of the embedding and stand for no text",
            )
        return self._token_bytes[token_id]

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation. Only the template's own markers become special tokens;
        a marker typed inside a message is encoded as the text that it is."""
        return self.encode_chat(messages, add_generation_prompt)[0]

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether the assistant has to produce it."""
        ids: list[int] = []
        mask: list[bool] = []
        for text, special, produced in self._template.segments(
            messages, add_generation_prompt, self._special
        ):
            new = [self._special[text]] if special else self.encode(text)
            ids += new
            mask += [produced] * len(new)
        return ids, mask

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that is fed ids one by one."""
        return StreamDecoder(self, skip_special=skip_special)


class StreamDecoder:
    """Text of a growing token sequence; never emits half a UTF-8 character.

    The concatenation of all that `push` and `finish` return equals `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer._special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes; often one token's text, sometimes ''."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD if the tokens ended inside a character, else ''."""
        return self._utf8.decode(b"", final=True)


def byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character that stands for it in tokenizer.json (GPT-2, 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _token_bytes(vocabulary: Mapping[str, int], special: Mapping[str, int]) -> list[bytes]:
    byte_of = {letter: byte for byte, letter in byte_alphabet().items()}
    table: dict[int, bytes] = {}
    for token, token_id in vocabulary.items():
        if token not in special:
            table[token_id] = bytes(byte_of[letter] for letter in token)
    table |= {token_id: token.encode() for token, token_id in special.items()}
    return [table[token_id] for token_id in range(len(table))]


def tokenizer_config(template: str, special: Mapping[str, int]) -> dict[str, Any]:
    """The content of tokenizer_config.json, as transformers reads it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [t for t in special if t not in (BOS, EOS, PAD)],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "chat_template": template,
    }
