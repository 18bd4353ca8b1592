"""Texts in other languages than those that are wanted out of a corpus.

The package py3langid tells 140 languages apart by the bytes of a text, offline (Lui and Baldwin
2012, ACL; the model is inside the package). It is asked about the beginning, the middle and the end
of a text, and gives the languages shares that add up to one. A text stays if those that are wanted
have half of it together; very short texts, tables and source code are mostly not certain, and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from solollm.data.items import excerpt
from solollm.data.records import Records
from solollm.data.screening import LeftOut
from solollm.errors import ConfigError, nearest

LANGUAGES_NAME = "languages.jsonl"
_CERTAIN = 0.5
_PIECE = 1000  # characters of each of three
_NO_LANGUAGE = "zxx"  # of ISO 639: no linguistic content


class Languages:
    """The screen of one build, and its record."""

    def __init__(self, wanted: Sequence[str], records: Records) -> None:
        """`wanted`: ISO 639 codes such as "en".

        Raises:
            ConfigError: py3langid is not installed, or a code that it does not know.
        """
        self.records = records
        self._identifier = _identifier()
        known = sorted(set(self._identifier.nb_classes) - {_NO_LANGUAGE})
        for code in wanted:
            if code not in known:
                raise ConfigError(
                    f"the language {code!r} is not known",
                    why=f"codes are those of ISO 639: {', '.join(known)}",
                    fix=nearest(code, known) or "choose one of them",
                )
        self._wanted = frozenset(wanted)

    def take(self, text: str, source: str, place: str) -> str | LeftOut:
        ranked = self._identifier.rank(_pieces(text))
        share = sum(part for code, part in ranked if code in self._wanted)
        if share >= _CERTAIN:
            return text
        language, certainty = ranked[0]
        named = "none" if language == _NO_LANGUAGE else language
        is_certain = certainty >= _CERTAIN and named == language
        reason = f"in the language {language}" if is_certain else "in no certain language"
        beginning = excerpt(text)
        self.records.add(
            {
                "source": source, "place": place, "language": language,
                "certainty": round(certainty, 4), "wanted": round(share, 4),
                "beginning": beginning,
            }
        )  # fmt: skip
        return LeftOut(reason, f"{named} {certainty:.0%}:", beginning)


def _pieces(text: str) -> str:
    if len(text) <= 3 * _PIECE:
        return text
    middle = (len(text) - _PIECE) // 2
    return "\n".join((text[:_PIECE], text[middle : middle + _PIECE], text[-_PIECE:]))


def _identifier() -> Any:
    """Any: py3langid has no types."""
    fix = "pip install 'solollm[data]'"
    try:
        from py3langid import langid
    except ImportError as error:
        raise ConfigError("to tell languages apart needs the package py3langid", fix=fix) from error
    if not hasattr(langid.LanguageIdentifier, "from_model_file"):
        raise ConfigError(
            "the installed py3langid is not known here",
            why="versions before 0.4 read their model by pickle", fix=fix,
        )  # fmt: skip
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
