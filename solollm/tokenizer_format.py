"""What a tokenizer.json may say: the layout that SoloLLM writes, and the check before any load.

The library that reads these files can be hung by a regular expression, made to allocate without
end by a chain of replacements, and aborted by a broken table, so nothing reaches it that was not
understood here: byte-level BPE with a pre-tokenizer from a closed list. What a foreign file adds
around a text (its post-processor) is not run at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solollm.errors import IntegrityError
from solollm.strictfile import parse_json

MAX_VOCAB_SIZE = 1 << 20

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")  # and Qwen 3
KNOWN_PATTERNS = (GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN)
_MODEL_FIELDS: Mapping[str, Any] = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


@dataclass(frozen=True)
class TokenizerFormat:
    """A checked tokenizer.json. `added` holds the special tokens and any other added token;
    `is_own` says that the pre-tokenizer is SoloLLM's; `safe_json` is what may be loaded."""

    vocabulary: Mapping[str, int]
    added: Mapping[str, int]
    special: Mapping[str, int]
    is_own: bool
    safe_json: str


def byte_alphabet() -> str:
    """256 characters: the n-th stands for byte n in tokenizer.json (GPT-2, Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(spare)) for byte in range(256))


def fixed_pre_tokenizer() -> Any:
    """SoloLLM's pre-tokenizer as an object of `tokenizers`."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def write_format(special: Sequence[str], merges: Sequence[tuple[str, str]]) -> bytes:
    """The tokenizer.json of these special tokens (first ids) and merges (byte-level letters)."""
    letters = sorted(byte_alphabet())
    tokens = [*special, *letters, *(left + right for left, right in merges)]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(place, token) for place, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": _OWN_PRE_TOKENIZER,
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            **_MODEL_FIELDS,
            "vocab": {token: place for place, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def read_format(content: bytes, path: Path) -> TokenizerFormat:
    """Check a tokenizer.json. Raises IntegrityError that names the file and the place."""
    check = _Checker(path)
    top = check.mapping(parse_json(content, path), "the file")
    model = check.mapping(top.get("model"), "model")
    vocabulary = check.vocabulary(model)
    check.merges(model, vocabulary)
    added, special = check.added_tokens(top, vocabulary)
    check.normalizer(top.get("normalizer"))
    check.pre_tokenizer(top.get("pre_tokenizer"))
    check.require(_kind(top.get("decoder")) == "ByteLevel", "decoder", "is not ByteLevel")
    letters = set(byte_alphabet())
    check.require(
        all(letters.issuperset(token) for token in vocabulary if token not in added),
        "model.vocab", "holds a token that is not written in byte-level letters",
    )  # fmt: skip
    removed = {"truncation": None, "padding": None, "post_processor": None}
    own = top.get("pre_tokenizer") == _OWN_PRE_TOKENIZER and top.get("normalizer") is None
    own = own and added.keys() == special.keys()  # the library finds other added tokens in text
    return TokenizerFormat(
        vocabulary=vocabulary,
        added=added,
        special=special,
        is_own=own and not model.get("ignore_merges") and letters <= vocabulary.keys(),
        safe_json=json.dumps({**top, **removed}, ensure_ascii=False),
    )


def try_load(safe_json: str) -> int:
    """Load and use once; run in a confined child before a foreign file is loaded here. Returns
    the vocabulary's size."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(safe_json)
    tokenizer.encode_special_tokens = True
    for text in ("Hello, world! 123\n\n  x", "é 日本 🙂\u200d", "a" * 2000 + "$"):
        tokenizer.encode(text, add_special_tokens=False)
    return int(tokenizer.get_vocab_size())


class _Checker:
    """Refusals with the file's name and the place inside it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def require(self, condition: bool, place: str, problem: str) -> None:
        if not condition:
            raise IntegrityError(
                f"{self._path}: `{place}` {problem}",
                why="SoloLLM loads byte-level BPE tokenizers of known layouts only",
                fix="take the file from its publisher again, or train a tokenizer",
            )

    def mapping(self, value: Any, place: str) -> dict[str, Any]:
        self.require(isinstance(value, dict), place, "is not a JSON object")
        checked: dict[str, Any] = value
        return checked

    def token_id(self, value: Any, place: str) -> int:
        is_id = isinstance(value, int) and not isinstance(value, bool)
        self.require(is_id and 0 <= value < MAX_VOCAB_SIZE, place, f"has the id {value!r:.40}")
        return int(value)

    def vocabulary(self, model: Mapping[str, Any]) -> dict[str, int]:
        self.require(model.get("type", "BPE") == "BPE", "model.type", "is not BPE")
        for field, plain in _MODEL_FIELDS.items():
            value = model.get(field, plain)
            is_harmless = value == plain or value == "" or field in ("fuse_unk", "ignore_merges")
            self.require(is_harmless, f"model.{field}", f"is {value!r:.40}")
        vocabulary = self.mapping(model.get("vocab"), "model.vocab")
        for token, token_id in vocabulary.items():
            self.token_id(token_id, f"model.vocab[{token!r:.40}]")
        distinct = len(set(vocabulary.values())) == len(vocabulary)
        self.require(distinct, "model.vocab", "gives one id to two tokens")
        return vocabulary

    def merges(self, model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
        merges = model.get("merges")
        self.require(isinstance(merges, list), "model.merges", "is not a list")
        for place, merge in enumerate(merges or []):
            parts = merge.split(" ") if isinstance(merge, str) else merge
            is_pair = isinstance(parts, list) and len(parts) == 2
            is_pair = is_pair and all(isinstance(part, str) for part in parts)
            self.require(is_pair, f"model.merges[{place}]", "is not a pair of tokens")
            left, right = parts
            known = left in vocabulary and right in vocabulary and left + right in vocabulary
            self.require(known, f"model.merges[{place}]", "names a token outside the vocabulary")

    def added_tokens(
        self, top: Mapping[str, Any], vocabulary: Mapping[str, int]
    ) -> tuple[dict[str, int], dict[str, int]]:
        entries = top.get("added_tokens", [])
        self.require(isinstance(entries, list), "added_tokens", "is not a list")
        token_of = {token_id: token for token, token_id in vocabulary.items()}
        added: dict[str, int] = {}
        special: dict[str, int] = {}
        for place, value in enumerate(entries):
            name = f"added_tokens[{place}]"
            entry = self.mapping(value, name)
            content = entry.get("content")
            token = content if isinstance(content, str) else ""
            self.require(token != "", name, "has no content")
            token_id = self.token_id(entry.get("id"), name)
            is_free = token_of.setdefault(token_id, token) == token and token not in added
            self.require(
                is_free and vocabulary.get(token, token_id) == token_id,
                name, f"and another token share the id {token_id} or the text {token!r:.40}",
            )  # fmt: skip
            added[token] = token_id
            if entry.get("special") is True:
                special[token] = token_id
        return added, special

    def normalizer(self, value: Any) -> None:
        parts = value.get("normalizers") if _kind(value) == "Sequence" else [value]
        harmless = isinstance(parts, list) and len(parts) <= 4
        harmless = harmless and all(p is None or _kind(p) == "NFC" for p in parts)
        self.require(harmless, "normalizer", "is not NFC, the only one that is allowed")

    def pre_tokenizer(self, value: Any) -> None:
        parts = value.get("pretokenizers") if _kind(value) == "Sequence" else [value]
        self.require(isinstance(parts, list) and 0 < len(parts) <= 4, "pre_tokenizer", "is odd")
        for part in parts:
            kind = _kind(part)
            self.require(
                kind in ("ByteLevel", "Digits", "Split"), "pre_tokenizer", f"uses {kind!r:.40}"
            )
            if kind == "Split":
                pattern = part.get("pattern")
                known = isinstance(pattern, dict) and pattern.get("Regex") in KNOWN_PATTERNS
                self.require(known, "pre_tokenizer", f"splits by the unknown {pattern!r:.120}")
        self.require(_kind(parts[-1]) == "ByteLevel", "pre_tokenizer", "does not end in ByteLevel")


_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_OWN_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
}


def _added_token(place: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": place, "content": token, **flags, "special": True}


def _kind(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else None
