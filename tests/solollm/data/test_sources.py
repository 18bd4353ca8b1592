"""Reading files, folders and datasets, whatever they hold."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
import re
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from solollm.data.blocks import byte_lines, split_text, text_pieces
from solollm.data.items import Broken, Document, Item, Limits, PassedOver, Unreadable
from solollm.data.sources import read_documents, standard_library_sources
from solollm.errors import ConfigError, DataError

SMALL = Limits(max_document_chars=100, max_line_bytes=1000)


def _read(*sources: Path | str, limits: Limits | None = None) -> list[Item]:
    return list(read_documents([str(s) for s in sources], limits))


def _texts(items: list[Item]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def _only_broken(path: Path, limits: Limits | None = None) -> Broken:
    (item,) = _read(path, limits=limits)
    assert isinstance(item, Broken), item
    item.detail.encode(), item.excerpt.encode(), item.source.encode()
    return item


def _lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_every_format_gives_its_text(tmp_path: Path) -> None:
    """Guards each reader, plain and compressed, over a folder of all of them."""
    root = tmp_path / "raw"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "a.txt").write_text("plain é\n")
    (root / "b.MD").write_bytes(b"\xef\xbb\xbfwith a mark")
    (root / "deep" / "c.py").write_bytes("wide ☃".encode("utf-16"))
    (root / "deep" / "d.txt").write_bytes("wider ☃".encode("utf-32"))
    (root / "deep" / "er" / "e.jsonl").write_bytes(
        _lines({"text": "one"}, {"content": "two"}) + b"\r\n" + b'{"text": "three"}'
    )
    (root / "f.json").write_text(' [{"text": "four"},\n {"text": "five", "x": [1, {}]}] ')
    (root / "g.json").write_bytes(_lines({"text": "six"}))
    (root / "h.jsonl.gz").write_bytes(
        gzip.compress(_lines({"text": "seven"}))
        + gzip.compress(_lines({"text": "eight"}))
        + bytes(9)
    )
    (root / "i.txt.zst").write_bytes(zstandard.compress(b"ni") + zstandard.compress(b"ne"))
    table = pyarrow.table({"id": [1, 2], "text": ["ten", "eleven"]})
    pyarrow.parquet.write_table(table, root / "j.parquet")
    items = _read(root)
    assert not [item for item in items if not isinstance(item, Document)]
    assert _texts(items) == [
        "plain é\n", "with a mark", "four", "five", "six", "seven", "eight", "nine", "ten",
        "eleven", "wide ☃", "wider ☃", "one", "two", "three",
    ]  # fmt: skip
    places = [(i.source, i.place) for i in items if isinstance(i, Document)]
    assert ("raw/deep/er/e.jsonl", "line 4") in places
    assert ("raw/j.parquet", "row 2") in places
    assert _texts(_read(root / "a.txt")) == ["plain é\n"]
    odd = tmp_path / "README"
    odd.write_text("named by hand, so read as text")
    assert _texts(_read(odd)) == ["named by hand, so read as text"]


BAD_RECORDS = [
    (b'{"text": "x"', "not JSON"),
    (b"[" * 200_000, "JSON nested too deep"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "JSON nested too deep"),
    (b'{"n": ' + b"9" * 5000 + b', "text": "x"}', "not JSON"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\xc0\xaf overlong"}', "not UTF-8"),
    (b'{"text": 5}', "text is not a string"),
    (b'{"text": null}', "text is not a string"),
    (b'{"body": "x"}', "no text field"),
    (b"[1, 2]", "not a JSON object"),
    (b"NaN", "not a JSON object"),
    (b'"\\ud800"', "not a JSON object"),
    (b'{"text": "' + b"x" * 9_000_000 + b'"}', "line too long"),
]


@pytest.mark.parametrize("number", range(len(BAD_RECORDS)))
def test_a_bad_record_is_named_and_its_neighbours_kept(tmp_path: Path, number: int) -> None:
    """Guards against one hostile line ending a build, or vanishing without a word."""
    bad, reason = BAD_RECORDS[number]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + bad + b'\n{"text": "after", "n": NaN}\n')
    items = _read(path)
    assert _texts(items) == ["before", "after"]
    (broken,) = [item for item in items if isinstance(item, Broken)]
    assert (broken.reason, broken.place) == (reason, "line 2")
    broken.excerpt.encode()


def test_duplicate_keys_and_escapes_are_read_as_json_says(tmp_path: Path) -> None:
    """Guards D6: the last of equal keys counts; an escaped surrogate survives to the cleaning."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a", "text": "b"}\n{"text": "\\ud83d\\ude00 \\ud800"}\n')
    assert _texts(_read(path)) == ["b", "\U0001f600 \ud800"]


def _make_bomb(path: Path) -> None:
    """300 MB of one letter: 1,000:1 in gzip, 30,000:1 in zstd."""
    if path.suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(300):
                file.write(b"a" * 2**20)
    else:
        compressor = zstandard.ZstdCompressor(level=3).compressobj()
        blocks = [compressor.compress(b"a" * 2**20) for _ in range(300)]
        path.write_bytes(b"".join(blocks) + compressor.flush())


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_bombs_are_defused_early(tmp_path: Path, suffix: str) -> None:
    """Guards D2 and D3: reading stops soon after 16 MiB, what came before is kept and counted."""
    path = tmp_path / f"bomb.txt{suffix}"
    _make_bomb(path)
    assert path.stat().st_size < 2e6
    *documents, last = _read(path)
    assert isinstance(last, Broken)
    assert last.reason == "decompression bomb"
    assert sum(len(text) for text in _texts(documents)) <= 2**24 + 2**25
    wide = Limits(max_ratio=10**6, max_decompressed_bytes=2**23)
    *documents, last = _read(path, limits=wide)
    assert isinstance(last, Broken)
    assert last.reason == "decompresses to too much"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_cut_and_bit_flip_of_a_compressed_file_is_noticed(
    tmp_path: Path, suffix: str
) -> None:
    """Guards against half a file passing for a whole one."""
    noise = random.Random(0).randbytes(3000).hex().encode()
    sound = (
        gzip.compress(noise)
        if suffix == ".gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(noise)
    )
    path = tmp_path / f"x.txt{suffix}"
    for length in range(0, len(sound), 37):
        path.write_bytes(sound[:length])
        assert isinstance(_read(path)[-1], Broken), length
    for place in range(10, len(sound), 101):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        items = _read(path)
        assert isinstance(items[-1], Broken) or _texts(items) == [noise.decode()], place
    path.write_bytes(sound + b"trailing rubbish")
    assert isinstance(_read(path)[-1], Broken)


def test_a_huge_zstd_window_is_refused(tmp_path: Path) -> None:
    """Guards D3: a frame that demands 1 GB of memory before its first byte."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "x.txt.zst"
    path.write_bytes(compressor.compress(b"small") + compressor.flush())
    assert _only_broken(path).reason == "damaged compression"


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    """Guards D4: Latin-1, overlong and cut UTF-8, odd UTF-16, binaries."""
    path = tmp_path / "x.txt"
    cases = [
        (b"caf\xe9 au lait", "not UTF-8"),
        (b"overlong \xc0\xaf", "not UTF-8"),
        (b"surrogate \xed\xa0\x80", "not UTF-8"),
        (b"cut \xe2\x98", "not UTF-8"),
        (b"\xff\xfea\0\0\xd8", "not UTF-16-LE"),
        (b"\xfe\xff\0a\0", "not UTF-16-BE"),
        (b"\x7fELF\0\0\1", "binary file"),
    ]
    for content, reason in cases:
        path.write_bytes(content)
        assert _only_broken(path).reason == reason, content
    path.write_bytes(b"x" * 3_000_000 + b"\xff" + b"y" * 100)
    *kept, last = _read(path)
    assert isinstance(last, Broken)
    assert last.detail == "invalid start byte at byte 3000000"
    assert [len(text) for text in _texts(kept)] == [2**20]


def test_odd_files_never_block_or_end_a_build(tmp_path: Path) -> None:
    """Guards against FIFOs, devices, loops and dangling links, endless folders, odd names."""
    root = tmp_path / "raw"
    root.mkdir()
    os.mkfifo(root / "fifo.txt")
    (root / "loop.txt").symlink_to("loop.txt")
    (root / "dangling.txt").symlink_to("nowhere")
    (root / "zero.txt").symlink_to("/dev/zero")
    (root / "up").symlink_to(root, target_is_directory=True)
    (root / ".git").mkdir()
    (root / ".git" / "config.txt").write_text("hidden")
    (root / ".hidden.txt").write_text("hidden")
    (root / "image.PNG").write_bytes(b"\x89PNG")
    (root / "archive.bz2").write_bytes(bz2.compress(b"x"))
    (root / "nested.txt.gz.gz").write_bytes(gzip.compress(gzip.compress(b"x")))
    Path(os.fsdecode(os.fsencode(root) + b"/bad\xffname.txt")).write_text("kept")
    items = _read(root)
    assert _texts(items) == ["kept"]
    told = {
        item.source.removeprefix("raw/"): item.reason
        for item in items
        if not isinstance(item, Document)
    }
    assert told == {
        "fifo.txt": "not a regular file",
        "loop.txt": "cannot be opened",
        "dangling.txt": "cannot be opened",
        "zero.txt": "not a regular file",
        "up": "linked folder",
        ".git": "hidden or generated folder",
        ".hidden.txt": "hidden",
        "image.PNG": "file type .png",
        "archive.bz2": "file type .bz2",
        "nested.txt.gz.gz": "file type .gz in .gz",
    }
    (kept,) = [item for item in items if isinstance(item, Document)]
    assert kept.source == "raw/bad\\xffname.txt"
    assert sum(isinstance(item, PassedOver) for item in items) == 6


def test_a_file_named_by_hand_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    """Guards against manual pages and licences that no spelling of the command reads."""
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "ls.1.gz").write_bytes(gzip.compress(b"list"))
    assert _texts(_read(tmp_path / "LICENSE")) == ["free"]
    assert _texts(_read(tmp_path / "ls.1.gz")) == ["list"]
    reasons = sorted(item.reason for item in _read(tmp_path) if isinstance(item, PassedOver))
    assert reasons == ["file type (no suffix)", "file type .1 in .gz"]


def test_folders_may_be_deeper_than_the_stack(tmp_path: Path) -> None:
    """Guards against recursion: 1,500 levels of one-letter folders."""
    home = Path.cwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1500):
            Path("d").mkdir()
            os.chdir("d")
        Path("end.txt").write_text("found")
        os.chdir(home)
        assert _texts(_read(tmp_path)) == ["found"]
    finally:
        os.chdir(home)
        _remove_deep(tmp_path / "d")


def _remove_deep(folder: Path) -> None:
    """Delete folder/d/d/... one level a time: `shutil.rmtree`, and so pytest, recurses and dies."""
    while folder.exists():
        inner = folder.with_name("inner")
        if (folder / "d").exists():
            (folder / "d").rename(inner)
        shutil.rmtree(folder)
        if inner.exists():
            inner.rename(folder)


def test_damaged_parquet_is_quarantined(tmp_path: Path) -> None:
    """Guards D7: cut files, flipped bytes, forged counts, tables without text, odd columns."""
    path = tmp_path / "x.parquet"
    texts = [f"row {n} " + "x" * (n % 50) for n in range(300)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    sound = path.read_bytes()
    assert _texts(_read(path)) == texts
    for length in range(0, len(sound), len(sound) // 20 + 1):
        path.write_bytes(sound[:length])
        assert _only_broken(path).reason == "damaged Parquet file"
    for place in range(0, len(sound), len(sound) // 60 + 1):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 255]) + sound[place + 1 :])
        for item in _read(path):
            assert isinstance(item, Document | Broken)
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), path)
    assert _only_broken(path).reason == "no text field"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    items = _read(path)
    assert _texts(items) == ["a", "b"]
    assert [i.reason for i in items if isinstance(i, Broken)] == ["text is not a string"]


@given(
    st.lists(st.text(st.sampled_from("ab\n 雪"), max_size=60), max_size=6),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
def test_cutting_loses_nothing(texts: list[str], max_chars: int, shuffle: random.Random) -> None:
    """Guards text at block borders and cuts: pieces concatenate to the whole, in bounds."""
    whole = "".join(texts)
    encoded = whole.encode()
    cuts = sorted(shuffle.randrange(len(encoded) + 1) for _ in range(5))
    blocks = [encoded[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    pieces = list(text_pieces(blocks, max_chars))
    assert "".join(pieces) == whole
    assert pieces == split_text(whole, max_chars)
    assert all(len(piece) <= max_chars for piece in pieces)
    lines = list(byte_lines(blocks, 10**6))
    assert lines == (encoded.removesuffix(b"\n").split(b"\n") if encoded else [])
    for line, bounded in zip(lines, byte_lines(blocks, 7), strict=True):
        assert bounded == (line if line is not None and len(line) <= 7 else None)


def test_long_texts_are_cut_where_people_would(tmp_path: Path) -> None:
    """Guards the places of cuts, and that a long JSON text becomes parts, not rubbish."""
    assert split_text("aaa bb\n\ncc dd\nee", 10) == ["aaa bb\n\n", "cc dd\nee"]
    assert split_text("aaa bbb cc dd", 9) == ["aaa bbb ", "cc dd"]
    assert split_text("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    path = tmp_path / "x.jsonl"
    path.write_bytes(_lines({"text": "y" * 250}))
    items = _read(path, limits=SMALL)
    assert [len(text) for text in _texts(items)] == [100, 100, 50]
    assert isinstance(items[2], Document)
    assert items[2].place == "line 1 part 3"


def test_json_arrays_are_read_element_by_element(tmp_path: Path) -> None:
    """Guards arrays larger than a block, and rubbish in the middle of one."""
    path = tmp_path / "x.json"
    records = [{"text": f"{n} é " + "z" * (n % 900)} for n in range(5000)]
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1))
    assert _texts(_read(path)) == [record["text"] for record in records]
    for content, reason in (
        ('[{"text": "a"}, {"text": ', "not JSON"),
        ('[{"text": "a"}', "not JSON"),
        ('[{"text": "a"}, ' + "[" * 200_000, "JSON nested too deep"),
        ('[{"text": "a"}, {"text": "' + "z" * 20_000_000 + '"}]', "JSON element too long"),
    ):
        path.write_text(content)
        first, last = _read(path)
        assert isinstance(first, Document)
        assert isinstance(last, Broken)
        assert (last.reason, last.place) == (reason, "after item 1")
    path.write_text("")
    assert _read(path) == []


def test_a_json_file_of_settings_is_one_item(tmp_path: Path) -> None:
    """Guards the report of a code folder: one object over many lines is not a broken item for
    each of them; a file of JSON lines is still read line by line."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"name": "x", "list": [1, 2]}, indent=2))
    assert _only_broken(path).reason == "no text field"
    path.write_text(json.dumps({"text": "long", "list": [1, 2]}, indent=2))
    assert _texts(_read(path)) == ["long"]
    path.write_text('{\n "text": "a",\n rubbish\n}\n')
    assert _only_broken(path).reason == "not JSON"
    path.write_text('{"text": "a"}\nrubbish\n{"text": "b"}\n')
    assert _texts(_read(path)) == ["a", "b"]


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from(["txt", "jsonl", "json", "txt.gz", "jsonl.zst", "parquet"]),
)
def test_any_bytes_are_survived(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    """Guards curation against any input: only items come out, each printable."""
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(content)
    for item in _read(path, limits=SMALL):
        assert isinstance(item, Document | Broken)
        if isinstance(item, Broken):
            f"{item.reason}{item.detail}{item.excerpt}".encode()


class _Hub(types.ModuleType):
    """Stands in for the package `datasets`: the network is the system's edge."""

    def __init__(self, rows: Iterator[Any]) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.asked: Any = None

    def load_dataset(self, path: str, name: str | None, **options: Any) -> Iterator[Any]:
        self.asked = (path, name, options)
        return self.rows


def test_hub_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the hub source: names, streaming, one row at a time, bad rows quarantined."""
    hub = _Hub(iter([{"text": "a"}, {"text": 3}, {"content": "b"}]))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    items = _read("hf://owner/some.name/config-1:validation")
    assert hub.asked == ("owner/some.name", "config-1", {"split": "validation", "streaming": True})
    assert _texts(items) == ["a", "b"]
    assert [i.place for i in items if isinstance(i, Broken)] == ["row 2"]
    hub.rows = iter([])
    assert _read("hf://owner/name") == []
    assert hub.asked == ("owner/name", None, {"split": "train", "streaming": True})


def test_a_broken_off_hub_stream_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against half a dataset passing for the whole: other text at every try."""

    def rows() -> Iterator[Any]:
        yield {"text": "a"}
        raise ConnectionError("the network went away")

    monkeypatch.setitem(sys.modules, "datasets", _Hub(rows()))
    with pytest.raises(DataError, match=r"after 1 rows.*network went away"):
        _read("hf://owner/name")


@pytest.mark.parametrize(
    ("package", "name"),
    [("datasets", "hf://a/b"), ("zstandard", "x.txt.zst"), ("pyarrow", "x.parquet")],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    """Guards the optional extra: what to install, instead of a traceback."""
    monkeypatch.setitem(sys.modules, package, None)
    if package == "pyarrow":
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    source = name if "://" in name else str(tmp_path / name)
    if "://" not in name:
        Path(source).write_bytes(b"x")
    with pytest.raises(ConfigError, match=re.escape("pip install 'solollm[data]'")):
        _read(source)


def test_sources_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    """Guards against a typo read as an empty corpus."""
    for sources in ([], [str(tmp_path / "nope")], ["hf://justname"], ["s3://x/y"]):
        with pytest.raises(ConfigError):
            list(read_documents(sources))
    with pytest.raises(ConfigError, match="max_line_bytes"):
        Limits(max_line_bytes=0)
    with pytest.raises(ConfigError, match="text_fields"):
        Limits(text_fields=())


def test_standard_library_is_the_benchmarks_corpus() -> None:
    """Guards the recipe's corpus: this Python's own source, tests and tables left out."""
    files = standard_library_sources()
    assert files == sorted(files)
    total = sum(Path(file).stat().st_size for file in files)
    assert 400 <= len(files) <= 800
    assert 7e6 < total < 13e6
    if sys.version_info[:3] == (3, 11, 7):
        assert (len(files), round(total / 1e6, 2)) == (517, 9.66)
    documents = [item for item in _read("python://stdlib") if isinstance(item, Document)]
    assert len(documents) == len(files)
    assert any(document.source == "python/textwrap.py" for document in documents)


def test_unreadable_never_escapes(tmp_path: Path) -> None:
    """Guards the inner exception: callers see items only."""
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff")
    try:
        _read(path)
    except Unreadable:
        pytest.fail("Unreadable left solollm.data")
