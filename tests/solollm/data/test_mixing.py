"""`solollm data mix`: shares hold, nothing held out is trained on, nothing is lost."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from solollm.cli import main
from solollm.data.build import Progress, build_corpus
from solollm.data.canaries import Canaries
from solollm.data.decontamination import looked_for
from solollm.data.inspection import document_texts
from solollm.data.intake import Screening
from solollm.data.mixing import Part, mix_corpora
from solollm.data.report import CorpusReport, read_report, render_report
from solollm.data.shards import Split, read_index, verify_corpus
from solollm.errors import ConfigError, IntegrityError
from solollm.tokenizer import Tokenizer


def _texts(word: str, count: int, seed: int = 0) -> list[str]:
    """Different texts of different lengths."""
    generator = random.Random(f"{word}{seed}")
    return [
        f"{word} {number} "
        + "".join(generator.choices("abcdef é語\n", k=generator.randint(20, 90)))
        for number in range(count)
    ]


class _Corpora:
    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder, self._tokenizer = folder, tokenizer

    def build(self, name: str, texts: list[str], fraction: float = 0.1) -> Path:
        source = self._folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        build_corpus(
            [source], self._folder / name, tokenizer=self._tokenizer, validation_fraction=fraction
        )
        return self._folder / name


@pytest.fixture
def corpora(tmp_path: Path, small_tokenizer: Tokenizer) -> _Corpora:
    return _Corpora(tmp_path, small_tokenizer)


@pytest.fixture
def web(corpora: _Corpora) -> Path:
    return corpora.build("web", _texts("web", 300))


@pytest.fixture
def law(corpora: _Corpora) -> Path:
    return corpora.build("law", _texts("law", 60))


def _held(corpus: Path, split: Split = "train") -> Counter[str]:
    return Counter(document_texts(corpus, split))


def test_shares_hold_to_within_a_document(web: Path, law: Path, tmp_path: Path) -> None:
    """Guards the shares, whole and broken passes, the sums, and every byte that is written."""
    report = mix_corpora([Part(web, 3), Part(law, 2)], tmp_path / "m", tokens=15_000)
    assert verify_corpus(tmp_path / "m").fingerprint == report.fingerprint
    assert read_report(tmp_path / "m") == report
    parts = {part.corpus: part for part in report.mixed}
    longest = 120 * 4 + 2  # tokens of a document, at most
    assert parts["web"].tokens == pytest.approx(9000, abs=longest)
    assert parts["law"].tokens == pytest.approx(6000, abs=longest)
    assert sum(part.tokens for part in report.mixed) == report.splits["train"].tokens
    held = _held(tmp_path / "m")
    law_copies = {text: count for text, count in held.items() if text.startswith("law")}
    assert set(law_copies) == set(_held(law))
    whole = int(parts["law"].passes)
    assert whole >= 1
    assert set(law_copies.values()) == {whole, whole + 1}
    web_copies = {text: count for text, count in held.items() if text.startswith("web")}
    assert set(web_copies.values()) == {1}
    assert set(web_copies) < set(_held(web))
    assert report.splits["train"].text_bytes == sum(
        len(text.encode()) * count for text, count in held.items()
    )
    assert _held(tmp_path / "m", "validation") == _held(web, "validation") + _held(
        law, "validation"
    )
    assert report.dropped["not drawn"].count == len(_held(web)) - len(web_copies)
    assert report.unaccounted == 0


def test_without_weights_all_is_there_once(web: Path, law: Path, tmp_path: Path) -> None:
    """Guards the default, and rounding that would lose or double a document."""
    report = mix_corpora([Part(web), Part(law)], tmp_path / "m")
    assert _held(tmp_path / "m") == _held(web) + _held(law)
    assert [part.passes for part in report.mixed] == [1.0, 1.0]
    assert (report.dropped, report.duplicates) == ({}, 0)


def test_neither_order_nor_place_matters(web: Path, law: Path, tmp_path: Path) -> None:
    """Guards fingerprints."""
    parts = [Part(web, 0.3), Part(law, 0.7)]
    first = mix_corpora(parts, tmp_path / "a").fingerprint
    assert mix_corpora(parts[::-1], tmp_path / "b").fingerprint == first
    moved = tmp_path / "elsewhere" / "other name"
    moved.parent.mkdir()
    shutil.move(web, moved)
    assert mix_corpora([Part(law, 7), Part(moved, 3)], tmp_path / "c").fingerprint == first
    assert mix_corpora([Part(law, 6), Part(moved, 3)], tmp_path / "d").fingerprint != first


def test_copies_lie_apart_and_parts_among_each_other(web: Path, law: Path, tmp_path: Path) -> None:
    """Guards rows of one text, and a corpus that is one part after the other."""
    mix_corpora([Part(web, 1), Part(law, 1)], tmp_path / "m", tokens=20_000)
    texts = list(document_texts(tmp_path / "m", "train"))
    same = sum(one == other for one, other in pairwise(texts))
    assert same <= len(texts) // 50
    is_law = [text.startswith("law") for text in texts]
    changes = sum(one != other for one, other in pairwise(is_law))
    assert changes > len(texts) // 4


def test_what_one_part_holds_out_no_part_trains_on(corpora: _Corpora, tmp_path: Path) -> None:
    """Guards leaks between parts that were split otherwise, and documents that are in both."""
    texts = _texts("same", 200)
    one = corpora.build("one", [*texts, *_texts("one", 50)], fraction=0.3)
    other = corpora.build("other", [*texts, *_texts("other", 50)], fraction=0.05)
    report = mix_corpora([Part(one), Part(other)], tmp_path / "m")
    train, validation = _held(tmp_path / "m"), _held(tmp_path / "m", "validation")
    assert set(validation) == set(_held(one, "validation")) | set(_held(other, "validation"))
    assert set(train) == (set(_held(one)) | set(_held(other))) - set(validation)
    assert set(train.values()) == set(validation.values()) == {1}
    leaked = [text for text in _held(other) if text in _held(one, "validation")]
    assert report.dropped["held out by another part"].count == len(leaked) > 0
    assert report.items == 500
    assert report.kept + report.duplicates + len(leaked) == 500


def test_a_mix_can_be_mixed_and_says_what_it_is_of(
    web: Path, law: Path, corpora: _Corpora, tmp_path: Path
) -> None:
    """Guards a second round, and the words."""
    report = mix_corpora([Part(web, 1), Part(law, 9)], tmp_path / "m", tokens=40_000)
    told = render_report(report)
    law_part = next(part for part in report.mixed if part.corpus == "law")
    assert law_part.passes > 4
    assert f"law is in it {law_part.passes:.1f} times" in told
    assert law_part.share == pytest.approx(0.9, abs=0.01)
    assert f"{law_part.share:.1%}" in told
    third = corpora.build("third", _texts("third", 40))
    again = mix_corpora([Part(tmp_path / "m", 1), Part(third, 1)], tmp_path / "n")
    assert {part.corpus for part in again.mixed} == {"m", "third"}
    assert again.duplicates > 0  # a mix's copies are one document to the next


def test_benchmarks_that_all_parts_were_built_without(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    """Guards a claim of one part for all."""
    asked = [
        f"what did number {n} of them say to the one who came by after dark?" for n in range(3)
    ]
    for name, items in (("a", asked[:2]), ("b", asked[1:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(items))
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in _texts(name, 30))
        )
        questions = tmp_path / f"q{name}.jsonl"
        questions.write_text("".join(json.dumps({"question": q}) + "\n" for q in items))
        build_corpus(
            [tmp_path / f"{name}.jsonl"], tmp_path / name, tokenizer=small_tokenizer,
            screening=Screening(decontaminate=[str(questions)]),
        )  # fmt: skip
    report = mix_corpora([Part(tmp_path / "a"), Part(tmp_path / "b")], tmp_path / "m")
    assert looked_for(tmp_path / "m", asked) == (1, 2, 0)
    assert report.decontaminated == ()


def test_parts_that_do_not_go_together(
    web: Path, law: Path, corpora: _Corpora, tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    """Guards every refusal; nothing is written."""
    (tmp_path / "x.txt").write_text("\n".join(_texts("x", 90)))
    build_corpus([tmp_path / "x.txt"], tmp_path / "trained", vocab_size=320)
    build_corpus(
        [tmp_path / "web.jsonl"], tmp_path / "marked", tokenizer=small_tokenizer,
        canaries=Canaries(3),
    )  # fmt: skip
    twin = tmp_path / "twin"
    shutil.copytree(web, twin)
    for parts, match in (
        ([], "no corpora"),
        ([Part(web, 1), Part(web, 2)], "web is named twice"),
        ([Part(web, 1), Part(law)], "some corpora have a weight"),
        ([Part(web, 0), Part(law, 1)], "not above 0"),
        ([Part(web, float("nan")), Part(law, 1)], "not above 0"),
        ([Part(web), Part(tmp_path / "trained")], "another tokenizer"),
        ([Part(web), Part(tmp_path / "marked")], "holds canaries"),
        ([Part(web), Part(twin)], "adds nothing"),
        ([Part(web), Part(tmp_path / "nowhere")], "is not a built corpus"),
        ([Part(web, 1e9), Part(law, 1)], "less than half a document"),
    ):
        with pytest.raises(ConfigError, match=match):
            mix_corpora(parts, tmp_path / "m")
    with pytest.raises(ConfigError, match="0 tokens"):
        mix_corpora([Part(web)], tmp_path / "m", tokens=0)
    with pytest.raises(ConfigError, match="inside its own source"):
        mix_corpora([Part(web), Part(law)], web, overwrite=True)
    assert not (tmp_path / "m").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_part_is_named(web: Path, law: Path, tmp_path: Path) -> None:
    """Guards a mix of what a disk has changed."""
    path = law / "train" / "tokens-00000.bin"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"law/train/tokens-00000.bin"):
        mix_corpora([Part(web), Part(law)], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_mix_that_is_stopped_leaves_nothing(web: Path, law: Path, tmp_path: Path) -> None:
    """Guards the place at --out and what lies beside it."""

    def stop(state: Progress) -> None:
        if state.stage == "writing":
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        mix_corpora([Part(web), Part(law)], tmp_path / "m", progress=stop)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(
    web: Path, law: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards weights after the last =, folders with one in their name, and both ways to print."""
    odd = tmp_path / "a=2"
    web.rename(odd)
    words = ["data", "mix", f"{odd}=0.5", f"{law}=0.5", "--out", str(tmp_path / "m")]
    assert main([*words, "--tokens", "8e3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [part["corpus"] for part in report["mixed"]] in (["a=2", "law"], ["law", "a=2"])
    assert report["fingerprint"] == read_index(tmp_path / "m").fingerprint
    assert main(words) == 2
    assert "already holds a corpus" in capsys.readouterr().err
    assert main(["data", "mix", str(odd), str(law), "--out", str(tmp_path / "n")]) == 0
    assert "mixed of" in capsys.readouterr().out
    assert main(["data", "mix", f"{law}=many", "--out", str(tmp_path / "o")]) == 2
    assert "is no number" in capsys.readouterr().err


def test_old_reports_are_read(web: Path) -> None:
    """Guards corpora that were built before there were mixes."""
    path = web / "report.json"
    old = json.loads(path.read_text())
    for name in ("mixed", "decontaminated"):
        del old[name]
    path.write_text(json.dumps(old))
    assert isinstance(read_report(web), CorpusReport)
