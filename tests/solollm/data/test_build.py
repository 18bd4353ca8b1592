"""Building a corpus: everything accounted for, equal inputs equal corpora, nothing half done."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solollm import durable
from solollm.data.build import Progress, build_corpus, default_vocab_size
from solollm.data.inspection import corpus_tokenizer, view_batch, view_documents
from solollm.data.report import read_report, render_report
from solollm.data.shards import SplitReader, read_index, verify_corpus
from solollm.data.splits import HeldOut, tail_start
from solollm.data.stream import open_stream
from solollm.errors import ConfigError, DataError, IntegrityError, StorageError
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import train_tokenizer

WORDS = (
    "the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "42", "cats",
    "watch", "from", "afar",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 3, 300)


def _text(number: int) -> str:
    return (
        " ".join(WORDS[(number * k) % len(WORDS)] for k in range(1, 8 + number % 9)) + f" {number}"
    )


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """200 small files in three folders, with duplicates, empties and rubbish among them."""
    root = tmp_path / "library"
    for number in range(200):
        folder = root / f"shelf-{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(_text(number % 150))
    (root / "empty.txt").write_text("  \n ")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "lines.jsonl").write_text('{"text": "one line"}\nrubbish\n{"text": "\\ud800"}\n')
    (root / "photo.jpg").write_bytes(b"\xff\xd8")
    return root


def _stored(corpus: Path, split: str) -> list[str]:
    reader = SplitReader(corpus, "train" if split == "train" else "validation")
    tokenizer = corpus_tokenizer(corpus)
    return [tokenizer.decode(reader.document(n).tolist()) for n in range(reader.record.documents)]


def test_a_folder_of_files_without_suffixes_says_how_they_are_read(tmp_path: Path) -> None:
    """Guards against "give text files", said to somebody who gave text files."""
    (tmp_path / "licenses").mkdir()
    (tmp_path / "licenses" / "GPL-3").write_text("free as in speech")
    with pytest.raises(DataError, match=r"name the files one by one \(FOLDER/\*\)"):
        build_corpus([tmp_path / "licenses"], tmp_path / "corpus")
    report = build_corpus([tmp_path / "licenses" / "GPL-3"], tmp_path / "corpus", vocab_size=320)
    assert report.kept == 1


def test_every_item_is_accounted_for(library: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Guards against silent loss: in = kept + duplicates + dropped + broken, and each named."""
    out = tmp_path / "corpus"
    report = build_corpus([library], out, tokenizer=tokenizer, validation_fraction=0.1)
    assert (report.items, report.kept, report.duplicates) == (205, 151, 50)
    assert {k: v.count for k, v in report.dropped.items()} == {"empty": 1}
    broken = {"not UTF-8": 1, "not JSON": 1, "lone surrogate": 1}
    assert {k: v.count for k, v in report.broken.items()} == broken
    assert {k: v.count for k, v in report.passed_over.items()} == {"file type .jpg": 1}
    assert report.unaccounted == 0
    quarantine = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {(q["source"], q["place"], q["reason"]) for q in quarantine} == {
        ("library/latin.txt", "", "not UTF-8"),
        ("library/lines.jsonl", "line 2", "not JSON"),
        ("library/lines.jsonl", "line 3", "lone surrogate"),
    }
    assert "rubbish" in {q["excerpt"] for q in quarantine}
    expected = {_text(n) for n in range(150)} | {"one line"}
    train, validation = _stored(out, "train"), _stored(out, "validation")
    assert set(train) | set(validation) == expected
    assert len(train) + len(validation) == len(expected)
    assert 5 <= len(validation) <= 30
    assert report.splits["train"].text_bytes == sum(len(t.encode()) for t in train)
    assert sum(s.documents for s in report.sources) == 151
    assert report.longest[0].text_bytes == max(map(len, expected))
    assert read_report(out) == report
    verify_corpus(out)
    words = render_report(report)
    for part in ("205 items in: 151 kept, 50 duplicates", "lone surrogate", "library/latin.txt"):
        assert part in words


def test_equal_texts_give_an_equal_corpus_wherever_they_lie(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards reproducibility: another path, another order of listing, another layout of files,
    and even a tokenizer trained anew must not change one byte."""
    first = build_corpus([library], tmp_path / "a", vocab_size=300)
    moved = tmp_path / "elsewhere" / "deep"
    moved.mkdir(parents=True)
    texts = [path.read_bytes() for path in sorted(library.rglob("*/*.txt"))]
    (moved / "all.jsonl").write_text(
        "".join(json.dumps({"text": text.decode()}) + "\n" for text in reversed(texts))
    )
    single = tmp_path / "one line.txt"
    single.write_text("one line")
    second = build_corpus([str(single), str(moved)], tmp_path / "b", vocab_size=300)
    monkeypatch.chdir(tmp_path)
    third = build_corpus(["elsewhere", "one line.txt"], Path("c"), vocab_size=300)
    assert first.fingerprint == second.fingerprint == third.fingerprint
    for name in ("index.json", "train/tokens-00000.bin", "tokenizer/tokenizer.json"):
        contents = {(tmp_path / out / name).read_bytes() for out in "abc"}
        assert len(contents) == 1, name


def test_added_documents_move_none_between_the_splits(
    library: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Guards held-out text against leaking into training when a corpus grows."""
    build_corpus([library], tmp_path / "a", tokenizer=tokenizer, validation_fraction=0.1)
    for number in range(1000, 1100):
        (library / f"{number}.txt").write_text(_text(number))
    build_corpus([library], tmp_path / "b", tokenizer=tokenizer, validation_fraction=0.1)
    before, after = (
        set(_stored(tmp_path / "a", "validation")),
        _stored(tmp_path / "b", "validation"),
    )
    assert before < set(after)
    assert not before & set(_stored(tmp_path / "b", "train"))


def test_documents_that_were_neighbours_are_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Guards the shuffle: order by digest, and held-out digests spread over all of them."""
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(500)))
    build_corpus([source], tmp_path / "c", tokenizer=tokenizer, validation_fraction=0.5)
    numbers = [int(text.split()[1]) for text in _stored(tmp_path / "c", "train")]
    assert (np.abs(np.diff(numbers)) == 1).sum() <= 8
    digests = [
        hashlib.blake2b(text.encode(), digest_size=16).digest()
        for text in _stored(tmp_path / "c", "validation")
    ]
    assert digests == sorted(digests)
    assert digests[0][0] < 32
    assert digests[-1][0] > 223


def test_sha1_rule_is_the_recipes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Guards the benchmark's split: SHA-1 of the text is 0 modulo 20, nothing else decides."""
    texts = [f"file number {n}\n" for n in range(300)]
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_corpus([source], tmp_path / "c", tokenizer=tokenizer, split_rule="sha1-mod20")
    held_out = [t for t in texts if int(hashlib.sha1(t.encode()).hexdigest(), 16) % 20 == 0]
    assert sorted(_stored(tmp_path / "c", "validation")) == sorted(held_out)
    assert len(held_out) > 5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_documents_still_have_something_held_out(
    tmp_path: Path, tokenizer: Tokenizer, count: int
) -> None:
    """Guards the user with one big file: the end of the longest document is held out, on a line,
    and nothing is lost or doubled."""
    texts = ["".join(f"{n} line {line}\n" for line in range(100 + n)) for n in range(count)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    sources = [tmp_path / f"{n}.txt" for n in range(count)]
    report = build_corpus(sources, tmp_path / "c", tokenizer=tokenizer, validation_fraction=0.05)
    train, (held_out,) = _stored(tmp_path / "c", "train"), _stored(tmp_path / "c", "validation")
    assert len(train) == count
    assert sorted([*train, held_out], key=len)[0] == held_out
    longest = max(texts, key=len)
    assert longest.endswith(held_out)
    assert held_out.startswith(f"{count - 1} line")
    assert longest.removesuffix(held_out) in train
    share = len(held_out) / sum(map(len, texts))
    assert 0.03 < share < 0.06
    assert "end of the longest document is held out" in report.notes[0]
    assert report.kept == count
    open_stream(tmp_path / "c", split="validation", seq_len=8, batch_size=2)
    none = build_corpus(sources, tmp_path / "d", tokenizer=tokenizer, validation_fraction=0)
    assert none.splits["validation"].documents == 0
    with pytest.raises(DataError, match="validation split"):
        open_stream(tmp_path / "d", split="validation", seq_len=8, batch_size=2)


def test_tail_is_never_more_than_half() -> None:
    """Guards the smallest corpora: something is always left to train on."""
    for text in ("ab", "abc", "a\nb\nc\n", "x" * 10, "\n\n"):
        for wanted in (1, 2, 100):
            assert len(text) // 2 <= tail_start(text, wanted) < len(text)
    assert tail_start("a", 5) == 1


def test_nothing_left_is_exit_five_and_says_why(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Guards against an empty corpus that fails hours later, and against one bad file among good
    ones being fatal."""
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xff")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"1 item\W.*1 not UTF-8 \(such as bad\.txt\)") as caught:
        build_corpus([bad], tmp_path / "c", tokenizer=tokenizer)
    assert caught.value.exit_code == 5
    with pytest.raises(DataError, match=r"no files.*give text files"):
        build_corpus([empty], tmp_path / "c", tokenizer=tokenizer)
    (empty / "blank.txt").write_text(" ")
    with pytest.raises(DataError, match=r"1 empty.*look at what was left out"):
        build_corpus([empty], tmp_path / "c", tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "empty"]
    good = tmp_path / "good.txt"
    good.write_text("some text")
    assert build_corpus([bad, good], tmp_path / "c", tokenizer=tokenizer).kept == 1


def test_what_stands_at_out_is_never_half_overwritten(
    library: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Guards the user's files: other folders are refused, corpora replaced only when asked, and
    a failed build leaves the old one as it was."""
    out = tmp_path / "corpus"
    build_corpus([library], out, tokenizer=tokenizer)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="already holds a corpus"):
        build_corpus([library], out, tokenizer=tokenizer)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    with pytest.raises(DataError):
        build_corpus([bad], out, tokenizer=tokenizer, overwrite=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    good = tmp_path / "good.txt"
    good.write_text("other text")
    build_corpus([good], out, tokenizer=tokenizer, overwrite=True)
    assert _stored(out, "train")[0] in "other text"
    with pytest.raises(ConfigError, match="is no corpus"):
        build_corpus([good], library, tokenizer=tokenizer, overwrite=True)
    with pytest.raises(ConfigError, match="inside its own source"):
        build_corpus([library], library / "shelf-0" / "corpus", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="both a tokenizer and"):
        build_corpus([good], tmp_path / "x", tokenizer=tokenizer, vocab_size=300)
    with pytest.raises(ConfigError, match="validation_fraction"):
        build_corpus([good], tmp_path / "x", tokenizer=tokenizer, validation_fraction=1.0)


class _FullDisk(durable.Disk):
    """Fails the write number `last`, counting from 0, and all after it."""

    def __init__(self, last: int) -> None:
        self.last, self.writes = last, 0

    def write(self, fd: int, data: memoryview) -> int:
        self.writes += 1
        if self.writes > self.last:
            raise OSError(28, "No space left on device")
        return super().write(fd, data)


@pytest.mark.parametrize("near", [None, 0.8])
def test_a_full_disk_at_any_write_leaves_the_old_corpus(
    near: float | None, library: Path, tmp_path: Path, tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Guards against half a corpus under the final name, and against garbage left beside it."""
    out = tmp_path / "corpora" / "corpus"
    fingerprint = build_corpus([library], out, tokenizer=tokenizer).fingerprint
    extra = tmp_path / "extra.txt"
    extra.write_text("one more")
    counting = _FullDisk(10**9)
    monkeypatch.setattr(durable, "DISK", counting)
    sources = [library, extra]
    build_corpus(sources, tmp_path / "other", tokenizer=tokenizer, near_duplicates=near)
    assert counting.writes > 20
    for last in range(0, counting.writes, 7):
        monkeypatch.setattr(durable, "DISK", _FullDisk(last))
        with pytest.raises(StorageError, match="No space left"):
            build_corpus(sources, out, tokenizer=tokenizer, near_duplicates=near, overwrite=True)
        assert verify_corpus(out).fingerprint == fingerprint
        assert [path.name for path in out.parent.iterdir()] == ["corpus"]


def test_what_a_killed_build_left_is_swept(
    library: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Guards the disk against gigabytes of forgotten staging, and other files against the broom."""
    for name in (".tmp-corpus-0123abcd", ".tmp-corpus-notours", ".tmp-other-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    build_corpus([library], tmp_path / "corpus", tokenizer=tokenizer)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")} == {
        ".tmp-corpus-notours", ".tmp-other-0123abcd",
    }  # fmt: skip


def test_a_tokenizer_is_trained_on_the_training_split_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards held-out figures: merges must not have seen held-out text."""
    from solollm.data import build

    seen: list[str] = []

    def spy(texts: object, vocab_size: int) -> Tokenizer:
        assert vocab_size == 2048
        seen.extend(texts)  # type: ignore[call-overload]
        return train_tokenizer(seen, 300)

    monkeypatch.setattr(build, "train_tokenizer", spy)
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps({"text": _text(n)}) + "\n" for n in range(100)))
    build_corpus([source], tmp_path / "c", validation_fraction=0.2)
    assert sorted(seen) == sorted(_stored(tmp_path / "c", "train"))
    assert _stored(tmp_path / "c", "validation")
    assert [default_vocab_size(n) for n in (1, 10**8, 10**9)] == [2048, 8192, 32_768]


@pytest.mark.parametrize("near", [None, 0.8])
def test_progress_rises_through_the_stages(
    near: float | None, library: Path, tmp_path: Path
) -> None:
    """Guards the bar of long builds: each stage in turn, never backwards, ending at its total."""
    told: list[Progress] = []
    build_corpus(
        [library], tmp_path / "c", vocab_size=300, near_duplicates=near, progress=told.append
    )
    stages = list(dict.fromkeys(state.stage for state in told))
    comparing = [] if near is None else ["comparing"]
    assert stages == ["reading", *comparing, "tokenizer", "encoding"]
    for stage in stages:
        of_stage = [state for state in told if state.stage == stage]
        assert [s.done for s in of_stage] == sorted(s.done for s in of_stage)
        assert stage not in (*comparing, "encoding") or of_stage[-1].done == of_stage[-1].total


def test_views_show_what_is_stored(library: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Guards `data inspect`: decoded documents, and rows whose pieces are their documents."""
    out = tmp_path / "c"
    build_corpus([library], out, tokenizer=tokenizer)
    stored = _stored(out, "train")
    assert [view.text for view in view_documents(out, first=2, count=2)] == stored[2:4]
    assert len(view_documents(out, first=len(stored) - 1, count=9)) == 1
    with pytest.raises(ConfigError, match="no document"):
        view_documents(out, first=len(stored))
    for row in view_batch(out, 1, seq_len=60, batch_size=4):
        assert 0 < row.targets <= 60
        assert all(piece.startswith("<|bos|>") for piece in row.pieces[1:])
        assert all(piece.count("<|bos|>") <= 1 for piece in row.pieces)
    (out / "tokenizer" / "tokenizer.json").write_bytes(
        train_tokenizer(["other"], 300).files()["tokenizer.json"]
    )
    with pytest.raises(IntegrityError, match="not the tokenizer"):
        corpus_tokenizer(out)


RECORDS = st.one_of(
    st.builds(lambda t: json.dumps({"text": t}).encode(), st.text(max_size=20)),
    st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")),
    st.just(b'{"text": "same"}'),
    st.just(b""),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files=st.lists(st.lists(RECORDS, max_size=8), min_size=1, max_size=3))
def test_counts_add_up_for_any_input(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, files: list[list[bytes]]
) -> None:
    """Guards the promise of no silent loss on arbitrary lines: every line that is not blank is
    an item, and each ends in exactly one way."""
    folder = tmp_path_factory.mktemp("any")
    blank = 0
    for number, lines in enumerate(files):
        blank += sum(not line.strip() for line in lines)
        (folder / f"{number}.jsonl").write_bytes(b"\n".join(lines))
    try:
        report = build_corpus([folder], folder.parent / f"{folder.name}-c", tokenizer=tokenizer)
    except DataError:
        return
    whole_file = sum(cause.count for r, cause in report.broken.items() if r in WHOLE_FILE)
    if not whole_file:
        assert report.items == sum(map(len, files)) - blank
    assert report.unaccounted == 0
    with (folder.parent / f"{folder.name}-c" / "quarantine.jsonl").open() as file:
        assert sum(1 for _ in file) == sum(cause.count for cause in report.broken.values())


WHOLE_FILE = {"binary file", "not UTF-16-LE", "not UTF-16-BE", "not UTF-32-LE", "not UTF-32-BE"}

MEASURE = """
import json, resource, sys
from pathlib import Path
from solollm.data.build import build_corpus
from solollm.tokenizer import Tokenizer

tokenizer = Tokenizer.load(sys.argv[1])
tokenizer.encode_batch(["warm " * 1000])
import pyarrow.parquet, zstandard
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
base = peak()
report = build_corpus(sys.argv[3:], Path(sys.argv[2]), tokenizer=tokenizer)
print(json.dumps({"extra_mb": peak() - base, "kept": report.kept, "items": report.items,
                  "broken": {k: v.count for k, v in report.broken.items()}}))
"""


def _measure(tokenizer: Tokenizer, folder: Path, *sources: Path) -> dict[str, object]:
    tokenizer.save(folder / "tok")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder / "tok"), str(folder / "out"), *sources],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures: dict[str, object] = json.loads(done.stdout)
    print(figures)
    return figures


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux_only
def test_hostile_inputs_stay_within_memory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Guards P17: bombs, nests and long lines cost at most 512 MB above the start."""
    raw = tmp_path / "raw"
    raw.mkdir()
    with gzip.open(raw / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(60):
            file.write(b"[" * 2**20)
    (raw / "bomb.txt.zst").write_bytes(zstandard.compress(b"b" * 2**26))
    nested = b"[" + b"[]," * ((2**23 - 100) // 3) + b"[]]"
    (raw / "objects.jsonl").write_bytes(b'{"a": ' + nested[:-60] + b'[]], "text": "kept"}\n')
    (raw / "array.json").write_bytes(b"[" + nested * 2 + b"]")
    (raw / "long.jsonl").write_bytes(b'{"text": "' + "é".encode() * 2**24 + b'"}\n')
    (raw / "long.txt").write_bytes(b"word " * 2**22)
    figures = _measure(tokenizer, tmp_path, raw)
    assert figures["extra_mb"] < 512  # type: ignore[operator]
    broken = figures["broken"]
    assert isinstance(broken, dict)
    assert broken["decompression bomb"] == 2
    assert broken["line too long"] == 1


@linux_only
@pytest.mark.slow
def test_one_gigabyte_in_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Guards D1: 1 GB without a newline, as text and as JSON, within 512 MB above the start. The
    line repeats 16 blocks, so that the test does not wait for the tokenizer."""
    blocks = [os.urandom(2**19).hex().encode() for _ in range(16)]
    with (tmp_path / "line.txt").open("wb") as file:
        file.writelines(blocks * 64)
    with (tmp_path / "line.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        file.writelines(blocks * 64)
        file.write(b'"}\n{"text": "after"}\n')
    figures = _measure(tokenizer, tmp_path, tmp_path / "line.txt", tmp_path / "line.jsonl")
    assert figures["extra_mb"] < 512  # type: ignore[operator]
    assert (figures["kept"], figures["items"]) == (17, 2**10 + 2)
    assert figures["broken"] == {"line too long": 1}


def test_held_out_share_is_the_fraction() -> None:
    """Guards the hash rule's arithmetic at both ends of the range."""
    digests = [
        hashlib.blake2b(bytes([n, k]), digest_size=16).digest()
        for n in range(100)
        for k in range(100)
    ]
    for fraction in (0.0, 0.02, 0.5):
        taken = sum(HeldOut("hash", fraction).takes(b"", digest) for digest in digests)
        spread = 4 * math.sqrt(10_000 * fraction * (1 - fraction))
        assert abs(taken - 10_000 * fraction) <= spread


def test_index_names_the_tokenizer(library: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Guards the hand-over to training: ids, type and tokenizer of the index are the real ones."""
    build_corpus([library], tmp_path / "c", tokenizer=tokenizer)
    index = read_index(tmp_path / "c")
    assert index.tokenizer_digest == tokenizer.digest == corpus_tokenizer(tmp_path / "c").digest
    assert (index.bos_id, index.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert (index.vocab_size, index.dtype) == (tokenizer.vocab_size, "uint16")
    reader = SplitReader(tmp_path / "c", "train")
    text = tokenizer.decode(reader.document(0).tolist())
    ids = tokenizer.encode(text)
    assert reader.document(0).tolist() == [index.bos_id, *ids, index.eos_id]
