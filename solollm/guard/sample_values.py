"""Made-up personal data of every kind, right in its check digits, and things that only look so.

Nothing here belongs to anybody: all of it is drawn at random.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from solollm.personal import luhn_holds, mod_97

FIRST = ("Mira", "Jonas", "Aiko", "Tomás", "Leila", "Oskar", "Priya", "Wen", "Nadia", "Colm")
LAST = ("Okafor", "Lindqvist", "Moreau", "Tanaka", "Vance", "Novak", "Ibarra", "Haddad", "Petrov")
_DOMAINS = ("mailbox", "fastpost", "northwind-labs", "kestrel", "bluefjord", "cs.uni-tal", "orbit9")
_ENDINGS = ("com", "org", "de", "co.uk", "io", "net", "fr", "edu", "app", "com.br", "jp", "dev")


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(count))


def shaped(rng: random.Random, shape: str) -> str:
    """`#` becomes a digit, `%` one from 2 to 9."""
    return "".join(
        rng.choice(string.digits) if c == "#" else rng.choice("23456789") if c == "%" else c
        for c in shape
    )


def email(rng: random.Random) -> str:
    first, last = rng.choice(FIRST).lower(), rng.choice(LAST).lower()
    user = rng.choice(
        (f"{first}.{last}", f"{first}{last}{rng.randint(1, 99)}", f"{first[0]}{last}",
         f"{last}_{first}", f"{first}+{rng.choice(('shop', 'lists'))}", f"{first}-{last}", last)
    )  # fmt: skip
    address = f"{user}@{rng.choice(_DOMAINS)}.{rng.choice(_ENDINGS)}"
    return address.title() if rng.random() < 0.05 else address


def card(rng: random.Random) -> str:
    start, length = rng.choice(
        (("4", 16), ("5" + rng.choice("12345"), 16), ("34", 15), ("37", 15), ("6011", 16),
         ("36", 14), ("2" + str(rng.randint(300, 699)), 16), ("3530", 16))
    )  # fmt: skip
    body = start + digits(rng, length - len(start) - 1)
    number = next(body + d for d in string.digits if luhn_holds(body + d))
    if length == 15 or length == 14:
        parts = [number[:4], number[4:10], number[10:]]
    else:
        parts = [number[i : i + 4] for i in range(0, 16, 4)]
    return rng.choice(("", " ", "-")).join(parts)


_BBANS = {
    "DE": "n" * 18, "GB": "aaaa" + "n" * 14, "FR": "n" * 10 + "c" * 11 + "nn", "ES": "n" * 20,
    "NL": "aaaa" + "n" * 10, "NO": "n" * 11, "CH": "n" * 5 + "c" * 12, "PL": "n" * 24,
    "BE": "n" * 12,
}  # fmt: skip
_CLASSES = {
    "n": string.digits,
    "a": string.ascii_uppercase,
    "c": string.digits + string.ascii_uppercase,
}


def iban(rng: random.Random) -> str:
    country = rng.choice(list(_BBANS))
    rest = "".join(rng.choice(_CLASSES[c]) for c in _BBANS[country])
    check = 98 - mod_97(f"{country}00{rest}")
    number = f"{country}{check:02d}{rest}"
    if rng.random() < 0.5:
        return number
    return " ".join(number[i : i + 4] for i in range(0, len(number), 4))


def id_number(rng: random.Random) -> str:
    if rng.random() < 0.7:
        area = rng.choice([n for n in range(1, 900) if n != 666])
        return f"{area:03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"
    letters = rng.choice(("AB", "CE", "JK", "PR", "SW", "YL"))
    pairs = [letters, digits(rng, 2), digits(rng, 2), digits(rng, 2), rng.choice("ABCD")]
    return rng.choice(("", " ")).join(pairs)


def key(rng: random.Random) -> str:
    def chars(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
        return "".join(rng.choice(alphabet) for _ in range(count))

    makers: tuple[Callable[[], str], ...] = (
        lambda: "sk-" + chars(48), lambda: "sk-proj-" + chars(60), lambda: "ghp_" + chars(36),
        lambda: "AKIA" + chars(16, string.ascii_uppercase + string.digits),
        lambda: "AIza" + chars(35),
        lambda: "hf_" + chars(34), lambda: "glpat-" + chars(20), lambda: "sk_live_" + chars(24),
        lambda: f"xoxb-{digits(rng, 12)}-{chars(24)}", lambda: "npm_" + chars(36),
        lambda: f"eyJ{chars(30)}.eyJ{chars(60)}.{chars(43)}",
    )  # fmt: skip
    return rng.choice(makers)()
