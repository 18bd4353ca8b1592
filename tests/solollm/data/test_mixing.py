"""Mixing corpora: shares that hold, equal contents equal mixtures, nothing held out trained on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solollm import durable
from solollm.data.build import Progress, build_corpus
from solollm.data.canaries import Canaries
from solollm.data.decontamination import looked_for
from solollm.data.inspection import corpus_tokenizer, view_documents
from solollm.data.intake import Screening
from solollm.data.mixing import mix_corpora
from solollm.data.parts import Part, parse_part
from solollm.data.report import CorpusReport, read_report, render_report
from solollm.data.shards import SplitReader, read_index, shard_path, verify_corpus
from solollm.data.shares import DOCUMENT, arranged, copies_of, sift
from solollm.data.stream import open_stream
from solollm.errors import ConfigError, DataError, IntegrityError, StorageError
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import train_tokenizer

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        ["a poem of web and code, number 0123456789, by heart and hand"] * 3, 300
    )


@pytest.fixture
def build(tmp_path: Path, tokenizer: Tokenizer) -> Build:
    """Builds the corpus `name` of texts, with a tenth of them held out."""

    def make(name: str, texts: list[str], folder: Path = tmp_path, **options: object) -> Path:
        source = folder / f"{name}.jsonl"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        settled = {"tokenizer": tokenizer, "validation_fraction": 0.1} | options
        build_corpus([source], folder / name, **settled)  # type: ignore[arg-type]
        return folder / name

    return make


def _texts(kind: str, count: int) -> list[str]:
    return [f"{kind} number {n}" + " and more of it" * (n * 7 % 11) for n in range(count)]


def _stored(corpus: Path, split: str) -> list[str]:
    reader = SplitReader(corpus, "train" if split == "train" else "validation")
    decode = corpus_tokenizer(corpus).decode
    return [decode(reader.document(n).tolist()) for n in range(reader.record.documents)]


def _longest(corpus: Path) -> int:
    reader = SplitReader(corpus, "train")
    return max(reader.document(n).size for n in range(reader.record.documents))


def _parts(report: CorpusReport) -> dict[str, tuple[float, int, int, float]]:
    return {p.name: (p.weight, p.documents, p.tokens, p.passes) for p in report.parts}


@pytest.mark.parametrize("tokens", [None, 400, 3000, 40_000])
def test_each_part_gives_its_share_within_a_document(
    build: Build, tmp_path: Path, tokens: int | None
) -> None:
    """Guards the weights: counted in tokens, from the stored documents and not from the report."""
    web, code = build("web", _texts("web", 120)), build("code", _texts("code", 40))
    held = sum(read_index(corpus).splits["train"].tokens for corpus in (web, code))
    report = mix_corpora([Part(web, 3), Part(code, 1)], tmp_path / "mixed", tokens=tokens)
    reader, given = SplitReader(tmp_path / "mixed", "train"), Counter[str]()
    documents = Counter[str]()
    for number, text in enumerate(_stored(tmp_path / "mixed", "train")):
        given[text.split()[0]] += reader.document(number).size
        documents[text.split()[0]] += 1
    for corpus, share in ((web, 0.75), (code, 0.25)):
        wanted = share * (tokens or held)
        assert abs(given[corpus.name] - wanted) <= _longest(corpus)
        own = read_index(corpus).splits["train"].tokens
        passes = given[corpus.name] / own
        assert _parts(report)[corpus.name] == (
            share, documents[corpus.name], given[corpus.name], pytest.approx(passes)
        )  # fmt: skip
    assert [part.name for part in report.parts] == ["web", "code"]
    assert report.unaccounted == 0
    assert read_report(tmp_path / "mixed") == report
    stored = _stored(tmp_path / "mixed", "train")
    record = verify_corpus(tmp_path / "mixed").splits["train"]
    assert record.text_bytes == sum(len(text.encode()) for text in stored)


def test_the_mixture_follows_from_contents_alone(build: Build, tmp_path: Path) -> None:
    """Guards reproducibility: other orders of the parts, other folders and names, weights of
    another scale, and texts that are in two parts, must not change one byte."""
    both = _texts("both", 30)
    corpora = [
        build("web", _texts("web", 60) + both), build("code", _texts("code", 40) + both),
        build("notes", _texts("notes", 25)),
    ]  # fmt: skip
    weights = [0.1, 0.2, 0.3]  # whose sum depends on the order of adding
    prints = set()
    for number, order in enumerate(permutations(range(3))):
        parts = [Part(corpora[i], weights[i]) for i in order]
        prints.add(mix_corpora(parts, tmp_path / f"m{number}", tokens=5000).fingerprint)
    moved = [shutil.move(corpus, tmp_path / f"x{n}") for n, corpus in enumerate(corpora)]
    parts = [Part(Path(path), 10 * weight) for path, weight in zip(moved, weights, strict=True)]
    again = mix_corpora(parts, tmp_path / "deep" / "er" / "m", tokens=5000)
    assert prints == {again.fingerprint}
    other = mix_corpora(parts, tmp_path / "more", tokens=5001 + _longest(parts[2].corpus))
    assert other.fingerprint not in prints
    assert (tmp_path / "m0" / "tokenizer" / "tokenizer.json").read_bytes() == (
        tmp_path / "deep" / "er" / "m" / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_a_small_part_is_passed_whole_times_and_its_copies_are_apart(
    build: Build, tmp_path: Path
) -> None:
    """Guards up-sampling: each document five or six times, never two copies side by side, and the
    reader told what that is worth."""
    web, code = build("web", _texts("web", 300)), build("code", _texts("code", 30))
    own = read_index(code).splits["train"].tokens
    report = mix_corpora([Part(web), Part(code)], tmp_path / "mixed", tokens=2 * round(5.5 * own))
    stored = _stored(tmp_path / "mixed", "train")
    counts = Counter(text for text in stored if text.startswith("code"))
    assert set(counts) == set(_stored(code, "train"))
    assert set(counts.values()) == {5, 6}
    assert _parts(report)["code"][3] == pytest.approx(5.5, abs=_longest(code) / own)
    assert not any(a == b for a, b in pairwise(stored))
    places = {text: [n for n, other in enumerate(stored) if other == text] for text in counts}
    gaps = [b - a for found in places.values() for a, b in pairwise(found)]
    assert np.mean(gaps) > len(stored) / 8
    assert max(Counter(t for t in stored if t.startswith("web")).values()) == 1
    (note,) = report.notes
    assert note.startswith("code is passed 5.5")
    assert "arXiv:2305.16264" in note
    words = render_report(report)
    head = r"\npart +asked +given +documents +tokens +passes\n"
    assert re.search(head + r"code +50\.\d% +50\.\d% ", words)


def test_nothing_held_out_is_trained_on(build: Build, tmp_path: Path) -> None:
    """Guards the validation figures: a text that one corpus holds out and the other trains on is
    left out, counted and shown; each held-out text is there once."""
    shared = _texts("shared", 200)
    web = build("web", _texts("web", 50) + shared, validation_fraction=0.3)
    code = build("code", _texts("code", 50) + shared, validation_fraction=0.02)
    leaks = set(_stored(web, "validation")) & set(_stored(code, "train"))
    assert len(leaks) > 10
    report = mix_corpora([Part(web), Part(code)], tmp_path / "mixed")
    held_out = _stored(tmp_path / "mixed", "validation")
    assert sorted(held_out) == sorted(
        set(_stored(web, "validation")) | set(_stored(code, "validation"))
    )
    assert not set(held_out) & set(_stored(tmp_path / "mixed", "train"))
    cause = report.dropped["equal to a held-out document"]
    assert cause.count == len(leaks)
    assert cause.examples[0].source == "code"
    assert {example.excerpt for example in cause.examples} <= {text[:200] for text in leaks}
    assert report.unaccounted == 0


def test_a_text_of_two_corpora_counts_once_a_pass(build: Build, tmp_path: Path) -> None:
    """Guards against doubled texts: the smaller corpus keeps what both hold, or it would be left
    with nothing of its own."""
    code = build("code", _texts("code", 40), validation_fraction=0)
    web = build("web", _texts("web", 60) + _texts("code", 40), validation_fraction=0)
    report = mix_corpora([Part(web, 3), Part(code, 1)], tmp_path / "mixed", tokens=2000)
    assert report.duplicates == 40
    assert (report.items, report.unaccounted) == (140, 0)
    counts = Counter(_stored(tmp_path / "mixed", "train"))
    assert set(counts.values()) == {1}
    (note,) = report.notes
    web_tokens = read_index(web).splits["train"].tokens
    own = web_tokens - read_index(code).splits["train"].tokens
    assert note.startswith(f"web has {own:,} tokens to train on, of {web_tokens:,}: the rest is")
    assert _parts(report)["code"][1] == sum(text.startswith("code") for text in counts)
    alone = mix_corpora([Part(web)], tmp_path / "alone")
    assert _parts(alone)["web"] == (1.0, 100, read_index(web).splits["train"].tokens, 1.0)


def test_a_part_without_a_document_of_its_own_is_said(build: Build, tmp_path: Path) -> None:
    """Guards against a division by nothing, and against a weight that silently has no effect."""
    texts = _texts("code", 40)
    held = build("held", texts, validation_fraction=0.5)
    train = build("train", _stored(held, "validation"), validation_fraction=0)
    with pytest.raises(DataError, match=r"train gives nothing to train on; of its \d+ training"):
        mix_corpora([Part(held), Part(train)], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_a_mixture_can_be_mixed_again(build: Build, tmp_path: Path) -> None:
    """Guards copies that a part holds already: they are its proportions, not duplicates."""
    long = [f"{text}, at length" + " and in detail" * 9 for text in _texts("code", 20)]
    web, code = build("web", _texts("web", 80)), build("code", long)
    mix_corpora([Part(web), Part(code)], tmp_path / "first")
    more = build("more", _texts("more", 60))
    first = read_index(tmp_path / "first").splits["train"]
    second = mix_corpora(
        [Part(tmp_path / "first", 2), Part(more, 1)], tmp_path / "second", tokens=3 * first.tokens
    )
    assert second.duplicates == 0
    assert _parts(second)["first"] == (
        pytest.approx(2 / 3), 2 * first.documents, 2 * first.tokens, 2.0
    )  # fmt: skip
    before = Counter(_stored(tmp_path / "first", "train"))
    after = Counter(_stored(tmp_path / "second", "train"))
    assert all(after[text] == 2 * count for text, count in before.items())
    longest = [(document.text_bytes, document.beginning) for document in second.longest]
    assert len(set(longest)) == len(longest) == 5
    half = mix_corpora([Part(tmp_path / "first")], tmp_path / "half", tokens=first.tokens // 2)
    assert abs(half.parts[0].tokens - first.tokens // 2) <= _longest(tmp_path / "first")
    assert half.unaccounted == 0


def test_a_damaged_part_ends_before_anything_is_written(build: Build, tmp_path: Path) -> None:
    """Guards against spreading damage under a new, valid fingerprint."""
    web, code = build("web", _texts("web", 30)), build("code", _texts("code", 30))
    path = shard_path(code, "train", 0)
    path.write_bytes(path.read_bytes()[:-2] + b"\x20\x00")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(IntegrityError, match=r"code/train/tokens-00000\.bin is damaged"):
        mix_corpora([Part(web), Part(code)], tmp_path / "mixed")
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_mixed_is_refused_with_the_way_out(build: Build, tmp_path: Path) -> None:
    """Guards each refusal's reason and what it tells to do."""
    web, code = build("web", _texts("web", 30)), build("code", _texts("code", 30))
    out = tmp_path / "mixed"
    own = build("own", _texts("own", 30), tokenizer=train_tokenizer(["other text " * 9], 290))
    with pytest.raises(ConfigError, match=r"different tokenizers.*--tokenizer \S+/web/tokenizer"):
        mix_corpora([Part(web), Part(own)], out)
    marked = build("marked", _texts("marked", 30), canaries=Canaries(3))
    with pytest.raises(ConfigError, match="holds canaries"):
        mix_corpora([Part(web), Part(marked)], out)
    with pytest.raises(ConfigError, match="are the same corpus"):
        mix_corpora([Part(web), Part(tmp_path / "code" / ".." / "web", 2)], out)
    shutil.copytree(web, tmp_path / "copy")
    with pytest.raises(ConfigError, match="copy are the same corpus; both have the fingerprint"):
        mix_corpora([Part(web), Part(tmp_path / "copy")], out)
    with pytest.raises(ConfigError, match="nothing to mix"):
        mix_corpora([], out)
    with pytest.raises(ConfigError, match="is not a built corpus"):
        mix_corpora([Part(tmp_path / "nothing")], out)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="the weight of"):
            mix_corpora([Part(web, weight), Part(code)], out)
    for tokens in (0, 10**30):
        with pytest.raises(ConfigError, match="from 1 to"):
            mix_corpora([Part(web)], out, tokens=tokens)
    for inside in (web, web / "deeper"):
        with pytest.raises(ConfigError, match="inside its own source"):
            mix_corpora([Part(web)], inside, overwrite=True)
    inner = build("inner", _texts("inner", 9), folder=code)
    with pytest.raises(ConfigError, match="lies inside the output"):
        mix_corpora([Part(inner)], code, overwrite=True)
    with pytest.raises(StorageError, match="ask for fewer --tokens"):
        mix_corpora([Part(web)], out, tokens=10**17)
    assert not out.exists()


def test_weights_are_read_after_the_last_equals_sign(tmp_path: Path) -> None:
    """Guards folders whose names hold an equals sign, and numbers that are none."""
    odd = tmp_path / "lr=0.3"
    odd.mkdir()
    assert parse_part("corpora/web") == Part(Path("corpora/web"), 1.0)
    assert parse_part("corpora/web=0.7") == Part(Path("corpora/web"), 0.7)
    assert parse_part("a=b=2e1") == Part(Path("a=b"), 20.0)
    assert parse_part(str(odd)) == Part(odd, 1.0)
    assert parse_part(f"{odd}=4") == Part(odd, 4.0)
    with pytest.raises(ConfigError, match="'half' of web is no number"):
        parse_part("web=half")


KILLED = """
import os, signal, sys
from pathlib import Path
from solollm.data import mixing
from solollm.data.parts import Part

class Writer(mixing.SplitWriter):
    def add(self, token_ids, text_bytes):
        super().add(token_ids, text_bytes)
        if self.num_documents == 20:
            os.kill(os.getpid(), signal.SIGKILL)

mixing.SplitWriter = Writer
mixing.mix_corpora([Part(Path(p)) for p in sys.argv[2:]], Path(sys.argv[1]), overwrite=True)
"""


def test_a_mixture_killed_in_the_middle_is_absent_and_swept(build: Build, tmp_path: Path) -> None:
    """Guards against half a corpus under the final name, and what was left of it staying."""
    web, code = build("web", _texts("web", 60)), build("code", _texts("code", 40))
    folder = tmp_path / "mixtures"
    for older in (None, "corpus"):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, folder / "corpus", web, code], check=False,
            env=os.environ,
        )  # fmt: skip
        assert done.returncode == -9
        names = {path.name for path in folder.iterdir()}
        assert names - {older} == {name for name in names if name.startswith(".tmp-corpus-")}
        assert len(names - {older}) == 1
        report = mix_corpora([Part(web), Part(code)], folder / "corpus", overwrite=True)
        assert [path.name for path in folder.iterdir()] == ["corpus"]
        assert verify_corpus(folder / "corpus").fingerprint == report.fingerprint


class _FullDisk(durable.Disk):
    """Fails the write number `last`, counting from 0, and all after it."""

    def __init__(self, last: int) -> None:
        self.last, self.writes = last, 0

    def write(self, fd: int, data: memoryview) -> int:
        self.writes += 1
        if self.writes > self.last:
            raise OSError(28, "No space left on device")
        return super().write(fd, data)


def test_a_full_disk_at_any_write_leaves_the_old_mixture(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards what stands at the output until a whole successor is there."""
    web, code = build("web", _texts("web", 60)), build("code", _texts("code", 40))
    out = tmp_path / "mixtures" / "corpus"
    fingerprint = mix_corpora([Part(web), Part(code)], out).fingerprint
    with pytest.raises(ConfigError, match="already holds a corpus"):
        mix_corpora([Part(web), Part(code)], out)
    counting = _FullDisk(10**9)
    monkeypatch.setattr(durable, "DISK", counting)
    mix_corpora([Part(web, 2), Part(code)], tmp_path / "other")
    assert counting.writes >= 8
    for last in range(counting.writes):
        monkeypatch.setattr(durable, "DISK", _FullDisk(last))
        with pytest.raises(StorageError, match="No space left"):
            mix_corpora([Part(web, 2), Part(code)], out, overwrite=True)
        assert verify_corpus(out).fingerprint == fingerprint
        assert [path.name for path in out.parent.iterdir()] == ["corpus"]


def test_documents_are_read_a_block_at_a_time(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards memory against growing with the text: no read exceeds a block or the longest
    document, and where blocks end changes nothing."""
    from solollm.data import mixing

    web, code = build("web", _texts("web", 200)), build("code", _texts("code", 100))
    whole = mix_corpora([Part(web, 2), Part(code, 3)], tmp_path / "whole")
    reads: list[int] = []
    read = SplitReader.tokens

    def spy(reader: SplitReader, start: int, stop: int) -> np.ndarray:
        reads.append(stop - start)
        return read(reader, start, stop)

    monkeypatch.setattr(SplitReader, "tokens", spy)
    monkeypatch.setattr(mixing, "_BLOCK_TOKENS", 50)
    pieces = mix_corpora([Part(web, 2), Part(code, 3)], tmp_path / "pieces")
    assert pieces.fingerprint == whole.fingerprint
    assert len(reads) > 300
    assert max(reads) <= max(50, _longest(web), _longest(code))


def test_progress_rises_through_the_stages(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the bar: each stage in turn, never backwards, ending at its total."""
    from solollm.data import mixing

    monkeypatch.setattr(mixing, "_BLOCK_TOKENS", 100)
    web, code = build("web", _texts("web", 60)), build("code", _texts("code", 40))
    told: list[Progress] = []
    mix_corpora([Part(web), Part(code)], tmp_path / "mixed", progress=told.append)
    assert list(dict.fromkeys(state.stage for state in told)) == ["checking", "reading", "writing"]
    for stage in ("checking", "reading", "writing"):
        done = [state.done for state in told if state.stage == stage]
        assert len(done) > 2
        assert done == sorted(done)
        assert {state.total for state in told if state.stage == stage} == {done[-1]}


def test_a_mixture_is_a_corpus_like_any(build: Build, tmp_path: Path) -> None:
    """Guards the hand-over: the stream, the views and the tokenizer take it as it is, and reports
    of corpora without parts are read as before."""
    web, code = build("web", _texts("web", 60)), build("code", _texts("code", 40))
    report = mix_corpora([Part(web), Part(code)], tmp_path / "mixed")
    stream = open_stream(tmp_path / "mixed", seq_len=32, batch_size=4)
    assert stream.num_bytes == report.splits["train"].text_bytes
    assert stream.batch(3).input_ids.shape == (4, 32)
    assert view_documents(tmp_path / "mixed", split="validation")[0].text
    old = json.loads((web / "report.json").read_text())
    del old["parts"]
    (web / "report.json").write_text(json.dumps(old))
    assert read_report(web).parts == ()
    assert "passes" not in render_report(read_report(web))


TABLES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 2), st.booleans(), st.integers(2, 40)), min_size=1,
    max_size=40,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(entries=TABLES, wanted=st.lists(st.integers(1, 300), min_size=3, max_size=3))
def test_every_document_is_accounted_for(
    entries: list[tuple[int, int, bool, int]], wanted: list[int]
) -> None:
    """Guards the counts on any corpora, with equal documents within and between them."""
    found = np.zeros(len(entries), DOCUMENT)
    sizes = {digest: size for digest, _, _, size in entries}
    for row, (digest, part, is_train, _) in zip(found, entries, strict=True):
        row["low"], row["part"], row["is_train"] = digest, part, is_train
        row["tokens"] = sizes[digest]
    sifted = sift(found)
    held_out = {digest for digest, _, is_train, _ in entries if not is_train}
    assert sifted.validation["low"].tolist() == sorted(held_out)
    assert set(sifted.leaked["low"].tolist()) == held_out & {d for d, _, t, _ in entries if t}
    own = Counter((int(d["low"]), int(d["part"])) for d in sifted.train)
    trained = Counter((d, p) for d, p, is_train, _ in entries if is_train and d not in held_out)
    lowest = {d: min(p for e, p in trained if e == d) for d, _ in trained}
    assert own == Counter({key: n for key, n in trained.items() if lowest[key[0]] == key[1]})
    counted = sifted.train.size + sifted.validation.size + sifted.leaked.size
    assert counted + sifted.num_duplicates == len(entries)
    if {p for _, p in own} != {0, 1, 2}:
        return
    copies = copies_of(sifted.train, wanted)
    order = arranged(sifted.train, copies)
    assert np.bincount(order, minlength=sifted.train.size).tolist() == copies.tolist()
    for part, tokens in enumerate(wanted):
        mine = sifted.train["part"] == part
        given = int((sifted.train["tokens"][mine].astype(int) * copies[mine]).sum())
        assert given > 0
        assert np.ptp(copies[mine]) <= 1
        assert abs(given - tokens) <= int(sifted.train["tokens"][mine].max())


def test_benchmarks_that_all_parts_were_built_without(build: Build, tmp_path: Path) -> None:
    """Guards a claim of one part for all of them."""
    asked = [f"what did number {n} say to the one who came by after dark?" for n in range(3)]
    for name, items in (("one", asked[:2]), ("other", asked[1:])):
        questions = tmp_path / name / "test.jsonl"
        questions.parent.mkdir()
        questions.write_text("".join(json.dumps({"question": q}) + "\n" for q in items))
        build(
            f"of-{name}", [*_texts(name, 30), items[0]],
            screening=Screening(decontaminate=[str(questions)]),
        )  # fmt: skip
    report = mix_corpora([Part(tmp_path / "of-one"), Part(tmp_path / "of-other")], tmp_path / "m")
    assert looked_for(tmp_path / "m", asked) == (1, 2, 0)
    assert report.decontaminated == ()
    again = build("again", _texts("again", 30), screening=Screening(
        decontaminate=[str(tmp_path / "one" / "test.jsonl")]
    ))  # fmt: skip
    both = mix_corpora([Part(tmp_path / "of-one"), Part(again)], tmp_path / "n")
    (found,) = both.decontaminated
    assert (found.source, found.items, found.found, found.texts) == ("one/test.jsonl", 2, 1, 1)
    assert looked_for(tmp_path / "n", asked) == (2, 1, 0)
