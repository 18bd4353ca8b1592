"""The fast encoder and trainer against plain `tokenizers`: the same ids, the same merges."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import unicodedata
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from solollm import fast_encoding, tokenizer_training
from solollm.fast_encoding import FastEncoder, is_faithful, plain_words_of, words_of
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import count_words, learn_merges, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def load_bench() -> ModuleType:
    """tools/bench_tokenizer.py, which has the plain side of every comparison."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tools" / "bench_tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # it sets the number of threads
        patch.setenv("RAYON_NUM_THREADS", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        spec.loader.exec_module(module)
    return module


bench = load_bench()


def stdlib_texts(limit: int) -> list[str]:
    """Source files of the standard library, about `limit` characters in all."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        if sum(map(len, texts)) > limit:
            break
    return texts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    other = ["\u4e2d\u6587 \u0939\u093f\u0928\u094d\u0926\u0940 \u00e9t\u00e9 \U0001f642 " * 20]
    return train_tokenizer(stdlib_texts(300_000) + other, 2048)


def test_every_code_point_is_split_as_the_plain_library_splits_it() -> None:
    """All of planes 0 to 3, and every 61st above, where nothing but private use is assigned.
    Python's Unicode tables are not the library's (its letters are thousands of code points
    newer than those of Python 3.11, its digits newer than its own letters)."""
    every = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 61)]
    for start in range(0, len(every), 2048):  # the library is slower on long texts
        text = "".join(f"a{chr(code)}.{chr(code)} " for code in every[start : start + 2048])
        assert list(chain.from_iterable(words_of(text))) == next(plain_words_of(text))


def test_fuzzed_strings_have_equal_ids(tokenizer: Tokenizer) -> None:
    """10,000 strings whose spaces, digits, quotes and marks meet in every order."""
    texts = bench.fuzz_texts(10_000, seed=1)
    plain = [
        e.ids
        for e in bench.plain_tokenizer(tokenizer).encode_batch(texts, add_special_tokens=False)
    ]
    fast = FastEncoder(bench.plain_tokenizer(tokenizer))
    assert [fast.encode(text).tolist() for text in texts] == plain


def test_every_pair_of_character_categories_splits_alike() -> None:
    """One character of each Unicode category beside each other, with and without space."""
    first: dict[str, str] = {}
    for code in chain(range(0xD800), range(0xE000, 0x110000)):
        first.setdefault(unicodedata.category(chr(code)) + str(code > 0xFFFF), chr(code))
    marks = [*first.values(), "'", "s", " ", "\n", "\u00bd", "\u0301"]
    for a in marks:
        text = "".join(f"{a}{b} {a} {b}x{a}1{b}\n{b}  {a}" for b in marks)
        assert list(chain.from_iterable(words_of(text))) == next(plain_words_of(text)), repr(a)


def test_real_text_has_equal_ids(tokenizer: Tokenizer) -> None:
    """The standard library's source; `tools/bench_tokenizer.py` does it for 10^7 tokens."""
    texts = stdlib_texts(1_500_000)
    plain = bench.plain_tokenizer(tokenizer).encode_batch(texts, add_special_tokens=False)
    fast = FastEncoder(bench.plain_tokenizer(tokenizer))
    for text, encoding in zip(texts, plain, strict=True):
        np.testing.assert_array_equal(fast.encode(text), encoding.ids)


def test_a_text_cut_into_chunks_has_equal_ids(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut inside a word, a run of spaces or before a digit would change tokens."""
    monkeypatch.setattr(fast_encoding, "_CHUNK_CHARS", 3)
    texts = bench.fuzz_texts(300, seed=2)
    plain = [
        e.ids
        for e in bench.plain_tokenizer(tokenizer).encode_batch(texts, add_special_tokens=False)
    ]
    fast = FastEncoder(bench.plain_tokenizer(tokenizer))
    assert [fast.encode(text).tolist() for text in texts] == plain
    assert len(list(words_of("a b c d e f g"))) > 1


def test_forgetting_words_changes_nothing(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of words is bounded; clearing it in the middle of a text must not show."""
    monkeypatch.setattr(fast_encoding, "_MAX_WORDS", 5)
    text = stdlib_texts(10_000)[0]
    fast = FastEncoder(bench.plain_tokenizer(tokenizer))
    assert fast.encode(text).tolist() == bench.plain_tokenizer(tokenizer).encode(text).ids
    assert len(fast._words) <= 5


def test_an_unfaithful_split_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check must see a pattern that forgets that a digit ends a run of spaces."""
    assert is_faithful()
    is_faithful.cache_clear()
    broken = fast_encoding.re.compile(r" ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+|[0-9]")
    monkeypatch.setattr(fast_encoding, "_ASCII_WORDS", broken)
    assert not is_faithful()
    is_faithful.cache_clear()


def test_without_a_faithful_split_everything_still_has_the_same_result(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out: plain encoding and plain counting, equal ids and an equal file."""
    texts = stdlib_texts(60_000)
    expected = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    trained = train_tokenizer(texts, 600).digest
    monkeypatch.setattr("solollm.tokenizer.is_faithful", lambda: False)
    monkeypatch.setattr(tokenizer_training, "is_faithful", lambda: False)
    fresh = Tokenizer(tokenizer.files())
    monkeypatch.setattr(fresh, "_slow_chars", 0)
    monkeypatch.setattr(fresh._fast, "encode", None)
    assert [ids.tolist() for ids in fresh.encode_batch(texts)] == expected
    assert train_tokenizer(texts, 600).digest == trained


def test_ids_do_not_change_when_the_fast_encoder_takes_over(tokenizer: Tokenizer) -> None:
    """The first texts are encoded plainly, the rest fast; nobody may notice."""
    texts = stdlib_texts(120_000)
    fresh = Tokenizer(tokenizer.files())
    before = fresh.encode_batch(texts[:1])[0]
    while fresh._slow_chars > 0:
        fresh.encode_batch(texts)
    np.testing.assert_array_equal(fresh.encode_batch(texts[:1])[0], before)


@pytest.mark.parametrize("many", [0, 64, 1 << 60])
def test_training_learns_the_merges_of_the_plain_trainer(
    many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal counts are the rule, not the exception; and runs such as "aaaa" or "abab" overlap.
    Both ways to merge, by arrays and one by one, must agree with the plain trainer."""
    monkeypatch.setattr(tokenizer_training, "_MANY_PLACES", many)
    runs = ["a" * n + " " + "ab" * n + " " + "aab" * n + "\u00e9" * n for n in range(1, 30)]
    texts = stdlib_texts(150_000) + runs + bench.fuzz_texts(300, seed=3)
    assert learn_merges(count_words(texts), 2500) == bench.plain_merges(texts, 2500)


def test_training_ends_when_no_pair_is_left() -> None:
    """A vocabulary larger than the text can fill is simply smaller."""
    texts = ["abab abab", ""]
    assert learn_merges(count_words(texts), 500) == bench.plain_merges(texts, 500)
    assert learn_merges(count_words([]), 500) == []


def test_training_gives_equal_bytes_in_another_process() -> None:
    """Neither hash seeds, nor threads, nor the order of a set may leak into the file."""
    texts = stdlib_texts(60_000)
    program = (
        "import sys, json; from solollm.tokenizer_training import train_tokenizer;"
        "print(train_tokenizer(json.load(sys.stdin), 900).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(texts),
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for seed, threads in (("1", "1"), ("2", "2"))
    }  # fmt: skip
    assert digests == {train_tokenizer(texts, 900).digest}


def test_distinct_words_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of random strings has as many words as tokens; memory must not follow it."""
    monkeypatch.setattr(tokenizer_training, "_MAX_DISTINCT_WORDS", 100)
    texts = [f"common word{chr(0x4E00 + n)}x{chr(0x5E00 + n)}" for n in range(1000)]
    counts = count_words(texts)
    assert len(counts) <= 100
    assert counts["common"] == 1000


def test_training_stops_after_the_bytes_asked_for() -> None:
    """`max_bytes` counts bytes, not characters, and never reads on."""

    def texts() -> Any:
        yield "\u00e9" * 10
        yield "b"
        raise AssertionError("read beyond the limit")

    assert count_words(texts(), max_bytes=21)["b"] == 1
