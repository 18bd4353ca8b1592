"""Personal data in a text: what looks like an address, a number or a key, and proves itself.

A pattern alone marks too much, so each find is checked: cards by Luhn and issuer, accounts by their
country's length and mod 97, telephone numbers by their shape or by a word before them. What is
known to belong to nobody (documentation's domains and numbers) is left alone. Time is linear in the
text: patterns are bounded, and a find looks no further back than `CONTEXT_CHARS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

Kind = Literal["email", "phone", "card", "iban", "id_number", "key"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LABELS = {
    "email": "[email]", "phone": "[phone number]", "card": "[card number]",
    "iban": "[bank account]", "id_number": "[ID number]", "key": "[key]",
}  # fmt: skip
CONTEXT_CHARS = 48  # how far before a find a word may stand that explains it
_ALWAYS = re.compile(r"[\d@]")  # one of these is in every find


class Find(NamedTuple):
    """A stretch of the text."""

    kind: Kind
    start: int
    end: int


def find_personal(text: str, before: str = "") -> list[Find]:
    """The finds in order, without overlaps; `before` is what stands in front of `text`."""
    if not _ALWAYS.search(text):
        return []
    finds = [
        Find(kind, start, end) for kind, search in _SEARCHES for start, end in search(text, before)
    ]
    return without_overlaps(finds)


def without_overlaps(finds: Sequence[Find]) -> list[Find]:
    """In order of place; of two that overlap, the one that came first stays."""
    taken = bytearray(max((find.end for find in finds), default=0))
    kept = []
    for find in finds:
        if taken.find(1, find.start, find.end) < 0:
            taken[find.start : find.end] = b"\1" * (find.end - find.start)
            kept.append(find)
    return sorted(kept, key=lambda find: find.start)


def bare(value: str) -> str:
    """A value without its separators and case, to compare it."""
    return re.sub(r"[\s().\-/]", "", value).casefold()


_GENERIC_TLDS = (
    "com|org|net|edu|gov|mil|int|info|biz|name|pro|app|dev|xyz|online|site|tech|store|cloud|email"
    "|club|blog|shop|live|news|agency|digital|studio|world|today|life|art|design|systems|software"
    "|academy|company|solutions|services|consulting|health|care|law|bank|museum|aero|jobs|mobi"
    "|travel|asia|berlin|hamburg|wien|paris|london|nyc|tokyo|family|group|team|work|works|page|link"
)
_EMAIL = re.compile(
    r"(?<![\w.%+\-])([\w%+\-](?:[\w.%+\-]{0,62}[\w%+\-])?)@"
    rf"((?:[a-zA-Z0-9\-]{{1,63}}\.){{1,6}}(?:[a-zA-Z]{{2}}|(?i:{_GENERIC_TLDS})))(?![\w\-@])"
)
_NOBODY_DOMAIN = re.compile(
    r"(?:^|\.)(?:example\.(?:com|net|org|edu)|example|test|invalid|localhost)$"
)
_NOBODY_USER = frozenset({"git", "noreply", "no-reply", "donotreply", "do-not-reply"})


def _emails(text: str, before: str) -> Iterator[tuple[int, int]]:
    for found in _EMAIL.finditer(text):
        user, domain = found[1].casefold(), found[2].casefold()
        if user not in _NOBODY_USER and not _NOBODY_DOMAIN.search(domain):
            yield found.span()


_CARD = re.compile(r"(?<![\w.+\-])\d(?:[ \-]?\d){12,18}(?![\w\-])")
_ISSUERS = (  # (first digits, lengths): the networks' published ranges
    (re.compile(r"4"), (13, 16, 19)),
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"6011|64[4-9]|65|62"), (16, 17, 18, 19)),
    (re.compile(r"35(?:2[89]|[3-8])"), (16, 17, 18, 19)),
    (re.compile(r"30[0-5]|3095|36|3[89]"), (14, 16)),
)


def _cards(text: str, before: str) -> Iterator[tuple[int, int]]:
    for found in _CARD.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        known = any(p.match(digits) and len(digits) in lengths for p, lengths in _ISSUERS)
        if known and len(set(digits)) > 2 and luhn_holds(digits):
            yield found.span()


def luhn_holds(digits: str) -> bool:
    """The check digit of card numbers (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


_IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30})(?![A-Za-z0-9])")
_IBAN_LENGTHS = {  # the SWIFT registry
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22,
    "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28,
    "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23,
    "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
    "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24,
    "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24, "TR": 26, "UA": 29, "VA": 22,
    "VG": 24, "XK": 20,
}  # fmt: skip


def _ibans(text: str, before: str) -> Iterator[tuple[int, int]]:
    for found in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(found[1][:2])
        if length is None:
            continue
        end = _end_of_chars(found[1], length)  # words after the account may look like a part of it
        if end is not None and mod_97(found[1][:end].replace(" ", "")) == 1:
            yield found.start(), found.start() + end


def _end_of_chars(text: str, count: int) -> int | None:
    """Where the first `count` characters that are no spaces end."""
    for place, char in enumerate(text):
        count -= char != " "
        if count == 0:
            return place + 1
    return None


def mod_97(iban: str) -> int:
    """An account number's remainder: 1 where it is right (ISO 13616)."""
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97


_SSN = re.compile(r"(?<![\w\-.])(?!000|666|9)\d{3}([\- ])(?!00)\d{2}\1(?!0000)\d{4}(?![\w\-])")
_SPECIMENS = frozenset({"078051120", "219099999", "123456789"})
_NINO = re.compile(
    r"(?<![A-Za-z0-9])(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]"
    r"(?: ?\d{2}){3} ?[A-D](?![A-Za-z0-9])"
)
_SIN = re.compile(r"(?<![\w\-.])\d{3}[\- ]\d{3}[\- ]\d{3}(?![\w\-])")
_SSN_WORD = re.compile(r"(?i)\bssn\b|social.security|tax(?:payer)?.id|\bitin\b")
_SIN_WORD = re.compile(r"(?i)\bsin\b|social.insurance")


def _id_numbers(text: str, before: str) -> Iterator[tuple[int, int]]:
    for found in _SSN.finditer(text):
        is_said = _SSN_WORD.search(_context(text, before, found.start()))
        if bare(found[0]) not in _SPECIMENS and (found[1] == "-" or is_said):
            yield found.span()
    for found in _NINO.finditer(text):
        yield found.span()
    for found in _SIN.finditer(text):
        is_said = _SIN_WORD.search(_context(text, before, found.start()))
        if is_said and luhn_holds(bare(found[0])):
            yield found.span()


_PHONE_WORD = re.compile(
    r"(?i)\b(?:(?:tele)?phone|tel|mobile|mob|cell|call|fax|text|dial|ring|reach|whatsapp|signal"
    r"|contact|hotline|sms|handy|telefon|mobil|phones?|numbers?|extension|line)\b"
)
_SEPARATED = r"(?:[ .\-/]|\)[ ]?| ?\()?"
_INTERNATIONAL = re.compile(
    rf"(?<![\w+.])(?:\+|(?<!\d )00)[1-9](?:{_SEPARATED}\d){{7,14}}(?![\d\w]|[.,]\d)"
)
_NORTH_AMERICAN = re.compile(
    r"(?<![\w.+\-/])(?:1[ .\-])?(?:\(([2-9]\d{2})\) ?|([2-9]\d{2})([.\- /]))"
    r"([2-9]\d{2})([.\- ])(\d{4})(?![\w\-]|[.,]\d)"
)
_NATIONAL = re.compile(rf"(?<![\w.+\-])\(?0[1-9](?:{_SEPARATED}\d){{7,10}}(?![\w\-]|[.,]\d)")
_FRENCH = re.compile(r"(?<![\w.+\-])0[1-9]([ .\-])\d{2}(?:\1\d{2}){3}(?![\w\-]|[.,]\d)")
_PLAIN = re.compile(r"(?<![\w.+\-])1?[2-9]\d{2}[2-9]\d{6}(?![\w\-]|[.,]\d)")


def _phones(text: str, before: str) -> Iterator[tuple[int, int]]:
    def is_said(found: re.Match[str]) -> bool:
        return _PHONE_WORD.search(_context(text, before, found.start())) is not None

    for found in _INTERNATIONAL.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        is_clear = found[0][0] == "+" or is_said(found) or not found[0].isdigit()
        if is_clear and 8 <= len(digits) <= 17 and not _is_fiction(digits[-10:]):
            yield found.span()
    for found in _NORTH_AMERICAN.finditer(text):
        is_clear = (
            found[1] is not None or "-" in (found[3], found[5]) or found[3] == found[5] == "."
        )
        digits = re.sub(r"\D", "", found[0])[-10:]
        if (is_clear or is_said(found)) and not _is_fiction(digits):
            yield found.span()
    for pattern in (_FRENCH, _NATIONAL, _PLAIN):
        for found in pattern.finditer(text):
            if pattern is _FRENCH or is_said(found):
                yield found.span()


def _is_fiction(digits: str) -> bool:
    """555-0100 to 555-0199 belong to nobody."""
    return len(digits) == 10 and digits[3:8] == "55501"


_KEY = re.compile(
    r"(?<![\w\-])(?:sk-(?:ant-|proj-|or-v1-)?[A-Za-z0-9_\-]{20,200}|gh[pousr]_[A-Za-z0-9]{36,80}"
    r"|github_pat_\w{22,100}|glpat-[\w\-]{20,60}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w\-]{35}"
    r"|xox[abeoprs]-[\w\-]{10,200}|hf_[A-Za-z0-9]{30,60}|npm_[A-Za-z0-9]{36}|pypi-[\w\-]{50,250}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,120}|whsec_[A-Za-z0-9]{24,64}|SG\.[\w\-]{22}\.[\w\-]{43}"
    r"|ya29\.[\w\-]{20,250}|dop_v1_[a-f0-9]{64}|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}"
    r"|eyJ[\w\-]{10,500}\.eyJ[\w\-]{5,700}(?:\.[\w\-]{5,500})?)(?![\w\-])"
)
_SECRET = re.compile(r"(?<![A-Za-z0-9_+/\-])[A-Za-z0-9_+/\-]{16,200}={0,2}(?![\w+/\-])")
_SECRET_WORD = re.compile(
    r"(?i)(?:api[ _-]?key|access[ _-]?key|secret(?:[ _-]?key)?|auth[ _-]?token|access[ _-]?token"
    r"|bearer|password|passwd|private[ _-]?key)[\"'`]?\s{0,3}(?:=|:|is)?>?\s{0,3}[\"'`]?$"
)


def _keys(text: str, before: str) -> Iterator[tuple[int, int]]:
    for found in _KEY.finditer(text):
        if _is_random(found[0]):
            yield found.span()
    for found in _SECRET.finditer(text):
        ahead = _context(text, before, found.start())
        if _SECRET_WORD.search(ahead) and _is_random(found[0]):
            yield found.span()


def _is_random(text: str) -> bool:
    """No placeholder: letters and digits, and not the same few again and again."""
    has_both = re.search(r"\d", text) and re.search(r"[A-Za-z]", text)
    return bool(has_both) and len(set(text)) >= 10


def _context(text: str, before: str, start: int) -> str:
    if start >= CONTEXT_CHARS:
        return text[start - CONTEXT_CHARS : start]
    return (before + text[:start])[-CONTEXT_CHARS:]


_Search = Callable[[str, str], Iterator[tuple[int, int]]]
_SEARCHES: tuple[tuple[Kind, _Search], ...] = (  # what is surest first
    ("key", _keys),
    ("email", _emails),
    ("iban", _ibans),
    ("card", _cards),
    ("id_number", _id_numbers),
    ("phone", _phones),
)
