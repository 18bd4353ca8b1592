"""Normalisation of text."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solollm.data.cleaning import Defect, normalise


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_normal_text_is_stable_and_clean(text: str) -> None:
    """Guards dedup: a text normalised twice must be the same text, without stray controls."""
    try:
        once = normalise(text)
    except Defect:
        return
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not [c for c in once if unicodedata.category(c) == "Cc" and c not in "\n\t"]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a\r\nb\rc\x0bd\x0ce\x85f", "a\nb\nc\nd\ne\nf"),
        ("\ufeff\ufeffmark", "mark"),
        ("nul\0 esc\x1b[31m del\x7f c1\x9b", "nul esc[31m del c1"),
        ("e\u0301", "\u00e9"),
        ("tab\tstays \n\n  so does space ", "tab\tstays \n\n  so does space "),
        ("\u00e9\r\n\0", "\u00e9\n"),
    ],
)
def test_each_rule(raw: str, clean: str) -> None:
    """Guards each rule by example, on the ASCII path and on the other."""
    assert normalise(raw) == clean


def test_what_utf8_cannot_hold_is_named() -> None:
    """Guards the tokenizer against lone surrogates out of JSON escapes."""
    with pytest.raises(Defect, match="lone surrogate"):
        normalise("fine \ud800 not")


def test_marks_without_end_are_refused_at_once() -> None:
    """Guards against quadratic time in NFC: unguarded, this text takes minutes. Controls between
    the marks must not hide the run, since they are removed first."""
    began = time.process_time()
    for text in ("a" + "\u0301\u0323" * 200_000, "a" + "\u0301\x01\u0323\x02" * 200_000):
        with pytest.raises(Defect, match="combining"):
            normalise(text)
    assert time.process_time() - began < 2
    assert normalise("a" + "\u0323" * 30) == unicodedata.normalize("NFC", "a" + "\u0323" * 30)
    words = "e\u0301" * 1000
    assert normalise(words) == "\u00e9" * 1000


@pytest.mark.parametrize("count", range(0, 65))
def test_any_number_of_marks_that_stand_apart_is_text(count: int) -> None:
    """A page of Hindi, Arabic or Hebrew with 16 to 29 of them ended the whole build."""
    text = "क्ष " * count
    assert normalise(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("count", range(28, 34))
def test_where_a_run_of_marks_is_too_long(count: int) -> None:
    """Guards the limit itself: 30 in a row are allowed, one more is not."""
    text = "x" + "\u0323" * count + "y"
    if count <= 30:
        assert normalise(text) == unicodedata.normalize("NFC", text)
    else:
        with pytest.raises(Defect, match="combining"):
            normalise(text)
