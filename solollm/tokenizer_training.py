"""Learning a vocabulary: byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909).

Words are counted while the texts stream by; the merges are then learned from the distinct words,
one array operation per merge instead of one Python step per occurrence. Ties go to the smaller
pair of ids, as in the trainer of `tokenizers`, so both learn the very same merges.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from solollm.chat_template import TEMPLATE
from solollm.errors import ConfigError
from solollm.fast_encoding import is_faithful, plain_words_of, words_of
from solollm.tokenizer import SPECIAL_TOKENS, Tokenizer, config_bytes
from solollm.tokenizer_format import byte_alphabet, write_format

MAX_RESERVED_TOKENS = 64
_MAX_DISTINCT_WORDS = 1 << 19
_MANY_PLACES = 64
_BORDER, _GONE = -1, -2  # in the symbol array: between two words, merged into its left neighbour


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    reserved_tokens: int | None = None,
    max_bytes: int | None = None,
) -> Tokenizer:
    """A tokenizer whose merges are the most frequent in `texts`; equal texts give equal files.

    Memory is bounded by the distinct words: past half a million of them the rarest are forgotten.

    Args:
        vocab_size: special tokens, 256 bytes and merges together. Fewer where the texts run
            out of pairs.
        reserved_tokens: special tokens `<|reserved_0|>`... kept for later use; default: a
            thirty-second of the room for merges, at most 64.
        max_bytes: stop reading `texts` after this many bytes of UTF-8.

    Raises:
        ConfigError: no room for the special tokens and 256 bytes.
    """
    if reserved_tokens is None:
        room = vocab_size - len(SPECIAL_TOKENS) - 256
        reserved_tokens = max(0, min(MAX_RESERVED_TOKENS, room // 32))
    special = [*SPECIAL_TOKENS, *(f"<|reserved_{n}|>" for n in range(reserved_tokens))]
    num_merges = vocab_size - len(special) - 256
    if num_merges < 0:
        raise ConfigError(
            f"a vocabulary of {vocab_size} has no room for {len(special)} special tokens and "
            "256 bytes",
            fix=f"ask for at least {len(special) + 256}, sensibly 1024 or more",
        )
    merges = learn_merges(count_words(texts, max_bytes), num_merges)
    return Tokenizer(
        {
            "tokenizer.json": write_format(special, merges),
            "tokenizer_config.json": config_bytes(special),
            "chat_template.jinja": TEMPLATE.encode(),
        }
    )


def count_words(texts: Iterable[str], max_bytes: int | None = None) -> Counter[str]:
    """How often each piece of the pre-tokenizer occurs in (the first `max_bytes` of) `texts`."""
    split = words_of if is_faithful() else plain_words_of
    counts: Counter[str] = Counter()
    num_bytes = 0
    for text in texts:
        for words in split(text):
            counts.update(words)
        if len(counts) > _MAX_DISTINCT_WORDS:
            counts = _without_rarest(counts)
        num_bytes += len(text.encode())
        if max_bytes is not None and num_bytes >= max_bytes:
            break
    return counts


def learn_merges(counts: Mapping[str, int], num_merges: int) -> list[tuple[str, str]]:
    """The first `num_merges` merges, in byte-level letters; fewer where no pair is left."""
    tokens = sorted(byte_alphabet())
    pairs = _Pairs(counts)
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges and (best := pairs.most_frequent()) is not None:
        left, right = best
        pairs.merge(left, right, new=len(tokens))
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
    return merges


class _Pairs:
    """All distinct words in one row of symbols, and how often each pair of neighbours occurs.

    A pair is one integer, left << 32 | right. All its occurrences arise in one step, the one that
    makes the younger of its two symbols; so their places are noted once and checked when used.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        letters = np.array(list(byte_alphabet()))
        symbol_of = np.argsort(np.argsort(letters))  # the 256 first symbols, as `tokens` has them
        words = [word.encode() for word in counts]
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        content = np.frombuffer(b"".join(words), np.uint8)
        place = np.arange(content.size) + np.repeat(np.arange(1, len(words) + 1), lengths)
        size = content.size + len(words) + 1
        self._symbol = np.full(size, _BORDER, np.int64)
        self._symbol[place] = symbol_of[content]
        self._weight = np.zeros(size, np.int64)
        self._weight[place] = np.repeat(np.fromiter(counts.values(), np.int64, len(words)), lengths)
        self._next = np.arange(1, size + 1)
        self._previous = np.arange(-1, size - 1)
        self._count: defaultdict[int, int] = defaultdict(int)
        self._places: dict[int, list[int] | np.ndarray] = {}
        self._heap: list[tuple[int, int]] = []
        self._note(np.flatnonzero((self._symbol[:-1] >= 0) & (self._symbol[1:] >= 0)))

    def most_frequent(self) -> tuple[int, int] | None:
        """The pair that occurs most, of several the smallest; None if there is none."""
        while self._heap:
            negative, key = heapq.heappop(self._heap)
            count = self._count[key]
            if count == -negative:
                return key >> 32, key & 0xFFFFFFFF
            if count > 0:
                heapq.heappush(self._heap, (-count, key))
        return None

    def merge(self, left: int, right: int, *, new: int) -> None:
        """Replace every occurrence of the pair by the symbol `new`, as a scan from the left does.

        The first merges touch thousands of places and pay for array operations; the many later
        ones touch a few.
        """
        places = self._places.pop(left << 32 | right)
        if len(places) > _MANY_PLACES:
            self._merge_many(np.asarray(places), left, right, new)
        else:
            few = places if isinstance(places, list) else places.tolist()
            self._merge_few(few, left, right, new)

    def _merge_few(self, places: list[int], left: int, right: int, new: int) -> None:
        symbol, weight = self._symbol.data, self._weight.data
        following, previous = self._next.data, self._previous.data
        count = self._count
        made: defaultdict[int, list[int]] = defaultdict(list)
        for first in places:
            second = following[first]
            if symbol[first] != left or symbol[second] != right:
                continue
            times = weight[first]
            before, after = previous[first], following[second]
            symbol_before, symbol_after = symbol[before], symbol[after]
            if symbol_before >= 0:
                count[symbol_before << 32 | left] -= times
                key = symbol_before << 32 | new
                count[key] += times
                made[key].append(before)
            if symbol_after >= 0:
                count[right << 32 | symbol_after] -= times
                key = new << 32 | symbol_after
                count[key] += times
                made[key].append(first)
            symbol[first], symbol[second] = new, _GONE
            following[first], previous[after] = after, first
        for key, noted in made.items():
            if count[key] > 0:
                self._places[key] = noted
                heapq.heappush(self._heap, (-count[key], key))

    def _merge_many(self, first: np.ndarray, left: int, right: int, new: int) -> None:
        symbol, following, previous = self._symbol, self._next, self._previous
        second = following[first]
        valid = (symbol[first] == left) & (symbol[second] == right)
        if left == right:
            valid &= _every_other(first, second, valid)
        first, second = first[valid], second[valid]
        before, after = previous[first], following[second]
        # In "abab" the second occurrence's left neighbour is the first one: one pair, not two.
        has_before = symbol[before] >= 0
        has_before[1:] &= before[1:] != second[:-1]
        has_after = symbol[after] >= 0
        starts = np.concatenate((before[has_before], second[has_after]))
        for key, total, _ in self._grouped(starts):
            self._count[key] -= total
        symbol[first], symbol[second] = new, _GONE
        following[first], previous[after] = after, first
        self._note(np.concatenate((before[has_before], first[has_after])))

    def _note(self, starts: np.ndarray) -> None:
        """Take in the pairs that start at these places; they did not occur before."""
        for key, total, places in self._grouped(starts):
            self._count[key] = total
            self._places[key] = places
            heapq.heappush(self._heap, (-total, key))

    def _grouped(self, starts: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(pair, how often it occurs, its places in order) of the pairs at these places."""
        keys = self._symbol[starts] << 32 | self._symbol[self._next[starts]]
        order = np.argsort(keys, kind="stable")
        keys, starts = keys[order], starts[order]
        begins = np.flatnonzero(np.diff(keys, prepend=-1))
        totals = np.add.reduceat(self._weight[starts], begins) if begins.size else begins
        ends = [*begins[1:].tolist(), starts.size]
        for key, total, begin, end in zip(
            keys[begins].tolist(), totals.tolist(), begins.tolist(), ends, strict=False
        ):
            yield key, total, starts[begin:end]


def _every_other(first: np.ndarray, second: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Which occurrences of a doubled symbol a scan from the left merges: in a run "aaaa" the
    1st, the 3rd and so on."""
    index = np.arange(first.size)
    starts_run = np.ones(first.size, bool)
    starts_run[1:] = (first[1:] != second[:-1]) | ~valid[:-1]
    run_start = np.maximum.accumulate(np.where(starts_run, index, 0))
    alternate: np.ndarray = (index - run_start) % 2 == 0
    return alternate


def _without_rarest(counts: Counter[str]) -> Counter[str]:
    """At most half of the allowed words: those above the lowest sufficient count."""
    least = 1
    while len(counts) > _MAX_DISTINCT_WORDS // 2:
        least += 1
        counts = Counter({word: count for word, count in counts.items() if count >= least})
    return counts
