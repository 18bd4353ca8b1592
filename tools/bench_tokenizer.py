"""Encoding and training against plain `tokenizers`: are the results equal, and how much faster?

    python tools/bench_tokenizer.py             one to two minutes
    python tools/bench_tokenizer.py --json

Stacks take turns in one process on one thread each; figures are medians of process CPU time. Ends
with exit code 1 where ids or merges differ. Text: the standard library's source, the files of
$SOLOLLM_TEST_DATA where that folder exists, and then installed packages until there is enough.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # before `tokenizers` makes its thread pool
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import gc
import json
import platform
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from solollm.data.sources import standard_library_sources
from solollm.fast_encoding import FastEncoder, is_faithful
from solollm.tokenizer import TOKENIZER, Tokenizer
from solollm.tokenizer_format import byte_alphabet, fixed_pre_tokenizer
from solollm.tokenizer_training import count_words, learn_merges, train_tokenizer

EQUALITY_TOKENS = 10_000_000
FUZZ_STRINGS = 10_000
BATCH_CHARS = 1 << 20
HELD_OUT_EVERY = 20
FRAGMENTS = (
    "the", " the", "'s", "'ll", "'LL", "'", " '", "''", "1", "23", " 4", "\u0660", "\u00bd", " ",
    "  ", "\t", "\n", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2003", "\u3000", "\u200d",
    "e\u0301", "\u00e9", "\u4e2d\u6587", "\U0001f642", "\U0001d7d8", "\U00020000", "\U0010ffff",
    "_", "__x__", "(", ").", "...", "<|end|>", "<|bos|>", "=", "==", "a" * 40, " " * 30,
    "\n" * 9, "\x00", "\ufeff",
)  # fmt: skip


def fuzz_texts(count: int, seed: int) -> list[str]:
    """Strings of fragments that meet at every kind of border, and of any code points."""
    source = random.Random(seed)

    def character() -> str:
        code = source.randrange(source.choice((0x80, 0x800, 0x3100, 0x10000, 0x20000, 0x110000)))
        return chr(code) if not 0xD800 <= code < 0xE000 else " "

    def text() -> str:
        pieces = source.choices(FRAGMENTS, k=source.randrange(1, 12))
        return "".join(piece + character() * source.randrange(2) for piece in pieces)

    return [text() for _ in range(count)]


def plain_tokenizer(tokenizer: Tokenizer) -> Any:
    """The file as `tokenizers` itself loads it, with special tokens read as text."""
    from tokenizers import Tokenizer as PlainTokenizer

    plain = PlainTokenizer.from_str(tokenizer.files()[TOKENIZER].decode())
    plain.encode_special_tokens = True
    return plain


def plain_merges(texts: list[str], num_merges: int) -> list[tuple[str, str]]:
    """The merges that the trainer of `tokenizers` learns with our pre-tokenizer."""
    from tokenizers import Tokenizer as PlainTokenizer
    from tokenizers import models, trainers

    plain = PlainTokenizer(models.BPE())
    plain.pre_tokenizer = fixed_pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges, initial_alphabet=list(byte_alphabet()), show_progress=False
    )
    plain.train_from_iterator(texts, trainer)
    merges = json.loads(plain.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def much_text() -> Iterator[str]:
    """More text than the equality needs, real data and the whole standard library first."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SOLOLLM_TEST_DATA", shared))
    paths = sysconfig.get_paths()
    for root, pattern in ((folder, "*.txt"), (paths["stdlib"], "*.py"), (paths["purelib"], "*.py")):
        for path in sorted(Path(root).rglob(pattern)):
            if root != paths["stdlib"] or "site-packages" not in path.parts:
                yield path.read_text(encoding="utf-8", errors="replace")


def compare_encoding(tokenizer: Tokenizer) -> dict[str, Any]:
    """Equality on `EQUALITY_TOKENS` and on the fuzz strings: counts, and how many texts differ."""
    plain, fast = plain_tokenizer(tokenizer), FastEncoder(plain_tokenizer(tokenizer))
    texts = fuzz_texts(FUZZ_STRINGS, seed=0)
    fuzzed = plain.encode_batch_fast(texts, add_special_tokens=False)
    differ = sum(e.ids != fast.encode(t).tolist() for t, e in zip(texts, fuzzed, strict=True))
    tokens = num_texts = 0
    for text in much_text():
        expected = plain.encode_batch_fast([text], add_special_tokens=False)[0].ids
        differ += expected != fast.encode(text).tolist()
        tokens += len(expected)
        num_texts += 1
        if tokens >= EQUALITY_TOKENS:
            break
    return {
        "tokens": tokens,
        "texts": num_texts,
        "fuzz_strings": len(texts),
        "differing_texts": differ,
    }


def in_turns(stacks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each stack; every round runs all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in stacks}
    for _ in range(repeats):
        for name, work in stacks.items():
            gc.collect()
            begin = time.process_time()
            work()
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def time_encoding(tokenizer: Tokenizer, texts: list[str], repeats: int) -> dict[str, Any]:
    """MB per CPU second; ours starts each time with no word remembered."""
    plain = plain_tokenizer(tokenizer)
    batches: list[list[str]] = [[]]
    for text in texts:
        if sum(map(len, batches[-1])) > BATCH_CHARS:
            batches.append([])
        batches[-1].append(text)

    def ours() -> None:
        fresh = Tokenizer(tokenizer.files())
        for batch in batches:
            fresh.encode_batch(batch)

    def theirs(encode: Callable[..., Any]) -> Callable[[], None]:
        def work() -> None:
            for batch in batches:
                for encoding in encode(batch, add_special_tokens=False):
                    assert encoding.ids

        return work

    seconds = in_turns(
        {
            "solollm": ours,
            "encode_batch": theirs(plain.encode_batch),
            "encode_batch_fast": theirs(plain.encode_batch_fast),
        },
        repeats,
    )
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rates = {name: megabytes / taken for name, taken in seconds.items()}
    return {
        "megabytes": megabytes,
        "MB_per_cpu_second": rates,
        "times_encode_batch": rates["solollm"] / rates["encode_batch"],
        "times_encode_batch_fast": rates["solollm"] / rates["encode_batch_fast"],
    }


def time_training(
    texts: list[str], held_out: list[str], vocab_size: int, repeats: int
) -> dict[str, Any]:
    """MB per CPU second, whether the merges are equal, and held-out bytes per token of both."""
    tokenizer = train_tokenizer(texts, vocab_size)
    num_merges = vocab_size - len(tokenizer.special_tokens) - 256
    learned: dict[str, list[tuple[str, str]]] = {}

    def ours() -> None:
        learned["solollm"] = learn_merges(count_words(texts), num_merges)

    def theirs() -> None:
        learned["tokenizers"] = plain_merges(texts, num_merges)

    seconds = in_turns({"solollm": ours, "tokenizers": theirs}, repeats)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(held_out))
    return {
        "vocab_size": vocab_size,
        "MB_per_cpu_second": {name: megabytes / taken for name, taken in seconds.items()},
        "times_tokenizers": seconds["tokenizers"] / seconds["solollm"],
        "equal_merges": learned["solollm"] == learned["tokenizers"],
        "held_out_bytes_per_token": sum(len(text.encode()) for text in held_out) / tokens,
    }


def measure(vocab_sizes: list[int], repeats: int) -> dict[str, Any]:
    """Every figure of this file."""
    paths = map(Path, standard_library_sources())
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    held_out = texts[::HELD_OUT_EVERY]
    train = [text for place, text in enumerate(texts) if place % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(train, vocab_sizes[0])
    assert is_faithful(), "the fast split differs from this version of `tokenizers`"
    return {
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
        "threads": os.environ["RAYON_NUM_THREADS"],
        "equality": compare_encoding(tokenizer),
        "encoding": time_encoding(tokenizer, texts, repeats),
        "training": [time_training(train, held_out, size, repeats) for size in vocab_sizes],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = measure(arguments.vocab_sizes, arguments.repeats)
    if arguments.json:
        print(json.dumps(figures))
    else:
        _print_table(figures)
    is_equal = figures["equality"]["differing_texts"] == 0
    return 0 if is_equal and all(row["equal_merges"] for row in figures["training"]) else 1


def _print_table(figures: dict[str, Any]) -> None:
    equality, encoding = figures["equality"], figures["encoding"]
    print(
        f"Python {figures['python']}, tokenizers {figures['tokenizers']}, "
        f"{figures['threads']} thread"
    )
    print(
        f"equal ids: {equality['tokens']:,} tokens of {equality['texts']:,} texts and "
        f"{equality['fuzz_strings']:,} fuzz strings, {equality['differing_texts']} differ"
    )
    print(f"encoding {encoding['megabytes']:.1f} MB, MB per CPU second:")
    for name, rate in encoding["MB_per_cpu_second"].items():
        print(f"  {name:<20} {rate:6.2f}")
    print(f"  = {encoding['times_encode_batch']:.1f} times encode_batch, ", end="")
    print(f"{encoding['times_encode_batch_fast']:.1f} times encode_batch_fast")
    for row in figures["training"]:
        rates = row["MB_per_cpu_second"]
        print(
            f"training {row['vocab_size']:,}: {rates['solollm']:.2f} against "
            f"{rates['tokenizers']:.2f} MB per CPU second = {row['times_tokenizers']:.1f} times; "
            f"merges {'equal' if row['equal_merges'] else 'DIFFER'}, held-out bytes per token "
            f"{row['held_out_bytes_per_token']:.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
