"""`--private`: what belongs to somebody does not reach a corpus, and nothing else is touched."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from solollm.data.build import build_corpus
from solollm.data.inspection import view_documents
from solollm.data.intake import Screening
from solollm.data.private import PrivateAction, clear
from solollm.data.report import CorpusReport, read_report, render_report
from solollm.errors import DataError
from solollm.personal import CONTEXT_CHARS, Find, find_personal, without_overlaps

KEY = (
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n"
    + "MIIEow" * 200
    + "\n-----END RSA PRIVATE KEY-----"
)
PLANTED = {
    "Write to ada.lovelace@engine.org today": "Write to [email] today",
    "card 4539 1488 0343 6467 is hers": "card [card number] is hers",
    "pay to DE89 3704 0044 0532 0130 00 now": "pay to [bank account] now",
    "call me: +44 20 7946 0018, late": "call me: [phone number], late",
    "her SSN is 536-90-4399, she says": "her SSN is [ID number], she says",
    "token ghp_a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8 leaked": "token [key] leaked",
    f"the key\n{KEY}\nis old": "the key\n[key]\nis old",
}
PROSE = (
    "In 1815, on 10 December, she was born; chapter 12, section 3.14.159 has 1.2.3.4 of it.\n"
    "Orders 2024-11-27 and 978-0-306-40615-7 (an ISBN), write to someone@example.com, not to us."
)


@pytest.mark.parametrize(("text", "expected"), PLANTED.items())
def test_values_are_replaced_by_what_they_were(text: str, expected: str) -> None:
    """Guards every kind, and the words around a find."""
    assert clear(text).text == expected
    assert clear(expected).kinds == {}


def test_prose_is_left_alone() -> None:
    """Guards dates, versions, ISBNs and addresses that belong to nobody."""
    assert clear(PROSE) == (PROSE, {})


def test_a_long_text_is_what_its_parts_are() -> None:
    """Guards the search in whole documents: context, order and overlaps do not depend on length."""
    filler = "and so it went on, page after page, until the end. " * 40
    whole = clear(filler.join(["", *PLANTED, ""])).text
    assert whole == filler.join(["", *PLANTED.values(), ""])


def test_finds_do_not_overlap() -> None:
    """Guards the choice between finds against one that compares all with all."""
    generator = random.Random(5)
    finds = [
        Find("key", start, start + generator.randint(1, 9))
        for start in (generator.randrange(300) for _ in range(200))
    ]
    plain: list[Find] = []
    for find in finds:
        if all(find.end <= other.start or find.start >= other.end for other in plain):
            plain.append(find)
    assert without_overlaps(finds) == sorted(plain, key=lambda find: find.start)


def test_context_is_what_stands_before() -> None:
    """Guards a word that explains a number, before the text and far within it."""
    number = "030 12345678"
    assert [find.kind for find in find_personal(number, "phone: ")] == ["phone"]
    assert find_personal(number, "phone: " + "x " * CONTEXT_CHARS) == []
    assert [find.kind for find in find_personal("word " * 99 + f"phone: {number}")] == ["phone"]


@pytest.mark.parametrize(
    "hostile",
    ["1 " * 100_000, "a@" * 100_000, "AA00 " * 40_000, "-----BEGIN PRIVATE KEY-----" * 8_000,
     "+1 (" * 50_000, "x" * 200_000 + "@", "secret=" * 30_000, "1-" * 100_000],
    ids=["digits", "ats", "accounts", "keys", "phones", "word", "secrets", "dashes"],
)  # fmt: skip
def test_hostile_texts_end(hostile: str) -> None:
    """Guards against patterns whose time grows with the square: these would take hours. Far from
    each other, two of them are what each is."""
    between = "\n" + "." * 2 * CONTEXT_CHARS + "\n"
    once = clear(hostile).text
    assert clear(hostile + between + hostile).text == once + between + once


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"Note {number} of many. " * 30)
    for name, number in (("a", "+44 20 7946 0018"), ("b", "+44 20 7946 0234")):
        (folder / f"{name}.txt").write_text(f"The same letter, call {number} or ada@engine.org.")
    return folder


def _build(sources: list[Path], out: Path, action: PrivateAction | None) -> CorpusReport:
    return build_corpus(sources, out, vocab_size=512, screening=Screening(private=action))


def _texts(corpus: Path) -> str:
    return "\n".join(
        view.text
        for split in ("train", "validation")
        for view in view_documents(corpus, split=split, count=99)
    )


def test_masking_comes_before_duplicates(notes: Path, tmp_path: Path) -> None:
    """Guards the sum, the counts, and that letters which differ by a number are one letter."""
    report = _build([notes], tmp_path / "c", "mask")
    assert (report.items, report.kept, report.duplicates) == (10, 9, 1)
    assert report.private == {"phone": 2, "email": 2}
    assert report.private_texts == 2
    text = _texts(tmp_path / "c")
    assert "call [phone number] or [email]." in text
    assert "7946" not in text
    lines = (tmp_path / "c" / "private.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert len(kept) == 2
    assert all(line["kinds"] == {"phone": 1, "email": 1} for line in kept)
    assert "7946" not in "".join(lines)
    shown = render_report(read_report(tmp_path / "c"))
    assert "private data in 2 items (private.jsonl): 2 " in shown


def test_dropping_says_why(notes: Path, tmp_path: Path) -> None:
    """Guards the second way, and a corpus of which nothing is left."""
    report = _build([notes], tmp_path / "c", "drop")
    assert (report.items, report.kept, report.dropped["private data"].count) == (10, 8, 2)
    assert "ada@" not in _texts(tmp_path / "c")
    with pytest.raises(DataError, match="nothing usable"):
        _build([notes / "a.txt"], tmp_path / "d", "drop")
    assert not (tmp_path / "d").exists()


def test_what_is_broken_is_not_shown(notes: Path, tmp_path: Path) -> None:
    """Guards a leak beside the corpus: broken items are not looked at for private data."""
    (notes / "bad.jsonl").write_text('{"text": "Mail ada@engine.org and \n')
    for name, action in (("shown", None), ("not", "mask")):
        _build([notes], tmp_path / name, action)
        written = (tmp_path / name / "quarantine.jsonl").read_text()
        assert "bad.jsonl" in written
        reported = (tmp_path / name / "report.json").read_text()
        assert ("ada@engine.org" in written + reported) == (action is None)


def test_equal_texts_and_setting_give_an_equal_corpus(notes: Path, tmp_path: Path) -> None:
    """Guards fingerprints, and that without the option nothing is looked for or written."""
    made = [
        _build([notes], tmp_path / name, action).fingerprint
        for name, action in (("a", "mask"), ("b", "mask"), ("c", None))
    ]
    assert made[0] == made[1] != made[2]
    assert not (tmp_path / "c" / "private.jsonl").exists()
    assert "ada@engine.org" in _texts(tmp_path / "c")
