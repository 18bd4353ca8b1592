"""`--language`: texts in wanted languages stay, and each other one goes with a reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from solollm.data.build import build_corpus
from solollm.data.inspection import document_texts
from solollm.data.intake import Screening
from solollm.data.languages import Languages
from solollm.data.records import Records
from solollm.errors import ConfigError

SENTENCES = {
    "en": "The court held that the defendant had no duty to warn the plaintiff of the danger.",
    "de": "Das Gericht entschied, dass der Beklagte den Kläger nicht vor der Gefahr warnen musste.",
    "fr": "Le tribunal a jugé que le défendeur n'était pas tenu d'avertir le demandeur du danger.",
    "ja": "裁判所は、被告には原告に危険を警告する義務はないと判断した。",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("py3langid")
    path = tmp_path / "texts"
    path.mkdir()
    for language, sentence in SENTENCES.items():
        for number in range(4):
            (path / f"{language}{number}.txt").write_text(f"{sentence} ({number}) {sentence}")
    (path / "short.txt").write_text("ok")
    return path


def _build(folder: Path, out: Path, *languages: str) -> tuple[str, dict[str, int]]:
    screening = Screening(languages=languages)
    report = build_corpus([folder], out, vocab_size=512, screening=screening)
    text = "\n".join(t for split in ("train", "validation") for t in document_texts(out, split))
    return text, {reason: cause.count for reason, cause in report.dropped.items()}


def test_wanted_languages_stay(folder: Path, tmp_path: Path) -> None:
    """Guards one language, several, and the reason of each that goes."""
    text, dropped = _build(folder, tmp_path / "one", "en")
    assert [name for name, sentence in SENTENCES.items() if sentence in text] == ["en"]
    assert dropped == {
        "in the language de": 4, "in the language fr": 4, "in the language ja": 4,
        "in no certain language": 1,
    }  # fmt: skip
    text, dropped = _build(folder, tmp_path / "two", "ja", "de")
    assert [name for name, sentence in SENTENCES.items() if sentence in text] == ["de", "ja"]
    lines = (tmp_path / "two" / "languages.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 9
    first = next(record for record in records if record["source"] == "texts/fr0.txt")
    assert first["language"] == "fr"
    assert first["certainty"] > 0.9 > 0.1 > first["wanted"]
    assert first["beginning"].startswith("Le tribunal")


def test_most_of_a_long_text_decides(folder: Path, tmp_path: Path) -> None:
    """Guards a text whose beginning is a licence in English, and one whose end is."""
    for path in folder.iterdir():
        path.unlink()
    german, english = SENTENCES["de"] * 200, SENTENCES["en"] * 9
    (folder / "licence.txt").write_text(english + german)
    (folder / "notice.txt").write_text(german + "\n" + english)
    screen = Languages(["de"], Records(tmp_path / "unused"))
    for path in folder.iterdir():
        assert screen.take(path.read_text(), "", "") == path.read_text()


def test_codes_and_packages_that_are_not_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards slips, a missing package, and one that would read its model by pickle."""
    for code in ("german", "zxx", ""):
        with pytest.raises(ConfigError, match="is not known"):
            _build(folder, tmp_path / "c", code)
    old = SimpleNamespace(langid=SimpleNamespace(LanguageIdentifier=object))
    monkeypatch.setitem(sys.modules, "py3langid", old)
    with pytest.raises(ConfigError, match="is not known here"):
        _build(folder, tmp_path / "c", "en")
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ConfigError, match="needs the package py3langid"):
        _build(folder, tmp_path / "c", "en")
    assert not (tmp_path / "c").exists()
