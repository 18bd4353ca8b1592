"""What the guard does, read from TOML. The defaults are the guard without a file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from solollm.errors import ConfigError, nearest
from solollm.guard.notices import Action
from solollm.personal import KINDS, Kind

MAX_PATTERN_CHARS = 1000


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PersonalTable(_Table):
    """`known_is_shown`: what the conversation itself holds is not hidden from who wrote it."""

    enabled: bool = True
    action: Action = "mask"
    kinds: tuple[Kind, ...] = KINDS
    known_is_shown: bool = True


class RepetitionTable(_Table):
    enabled: bool = True


class DistressTable(_Table):
    """`message` takes the place of the help lines; `phrases` are further signs, as plain text."""

    enabled: bool = True
    message: str = ""
    phrases: tuple[str, ...] = ()


class ClassifierTable(_Table):
    """`function`: `module:function`, which gets the answer so far and gives a number; from
    `threshold` on the answer ends. What it does not judge in time counts as `on_timeout`."""

    function: str = ""
    threshold: float = 0.5
    timeout_seconds: float = Field(0.2, gt=0, le=10)
    start_seconds: float = Field(60.0, gt=0)
    on_timeout: Literal["show", "block"] = "show"


class Rule(_Table):
    """A list of words, or a pattern (RE2), and what to do where one is found.

    `on`: the model's answer, or the user's last message, which is answered by `message` alone
    where the action is `block`. `max_chars`: the longest match of a pattern; as much text is held
    back. `ignore_case`: of a pattern; words match in any case.
    """

    name: str
    words: tuple[str, ...] = ()
    words_file: str = ""
    pattern: str = ""
    ignore_case: bool = True
    action: Action = "mask"
    on: Literal["output", "input"] = "output"
    replacement: str = "[removed]"
    message: str = ""
    max_chars: int = Field(64, ge=1, le=MAX_PATTERN_CHARS)

    @model_validator(mode="after")
    def _one_kind(self) -> Rule:
        has_words = bool(self.words or self.words_file)
        if has_words == bool(self.pattern):
            raise ValueError(f"rule {self.name!r} needs words or words_file, or else a pattern")
        if self.on == "input" and self.action == "mask":
            raise ValueError(f"rule {self.name!r}: a message is blocked or noted, not masked")
        return self


class GuardSettings(_Table):
    """The whole file."""

    personal: PersonalTable = PersonalTable()
    repetition: RepetitionTable = RepetitionTable()
    distress: DistressTable = DistressTable()
    classifier: ClassifierTable = ClassifierTable()
    rules: tuple[Rule, ...] = ()


def read_settings(path: Path) -> GuardSettings:
    """A file's settings, its word lists read in (one word or phrase a line, `#` begins a comment).

    Raises:
        ConfigError: no file, no TOML, an unknown or bad value, a list that cannot be read.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the guard's settings {path}", why=str(error)) from error
    try:
        settings = GuardSettings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path} does not fit", why=_problems(error)) from error
    rules = tuple(_with_words(rule, path.parent) for rule in settings.rules)
    return settings.model_copy(update={"rules": rules})


def _with_words(rule: Rule, folder: Path) -> Rule:
    if not rule.words_file:
        return rule
    path = folder / rule.words_file
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rule {rule.name!r}: cannot read {path}", why=str(error)) from error
    words = [line.partition("#")[0].strip() for line in lines]
    if not (rule.words or any(words)):
        raise ConfigError(f"rule {rule.name!r}: {path} holds no words")
    return rule.model_copy(update={"words": (*rule.words, *filter(None, words))})


def _problems(error: ValidationError) -> str:
    return "; ".join(_problem(found) for found in error.errors(include_url=False))


def _problem(found: Any) -> str:
    place = ".".join(map(str, found["loc"]))
    if found["type"] != "extra_forbidden":
        return f"{place}: {found['msg'].removeprefix('Value error, ')}"
    tables: dict[str, type[BaseModel]] = {
        "personal": PersonalTable, "repetition": RepetitionTable, "distress": DistressTable,
        "classifier": ClassifierTable, "rules": Rule,
    }  # fmt: skip
    first = str(found["loc"][0])
    table = tables.get(first, GuardSettings) if len(found["loc"]) > 1 else GuardSettings
    hint = nearest(str(found["loc"][-1]), table.model_fields)
    return f"unknown setting {place} {hint}".strip()
