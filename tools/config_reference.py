"""Write docs/reference/config.md from `solollm/config.py`, where every setting is described once.

    python tools/config_reference.py [--check]

`--check` writes nothing and ends with 1 where the file is out of date.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from solollm.architecture import ModelConfig
from solollm.config import AdapterTable, DpoTable, GrpoTable, RunConfig

TARGET = Path(__file__).resolve().parent.parent / "docs" / "reference" / "config.md"
_HEAD = """# Settings

Every setting of a run, made from `solollm/config.py` by `tools/config_reference.py`. A config file
holds them as TOML or YAML tables; on the command line any of them is `--set table.key=value`, and
an unknown key names the nearest one. What is left out gets the default, and what has none is
chosen: the model and its training by the dial, the rest by this machine's memory. The resolved
values stand in the run's `run.toml`.
"""
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_TABLE_HEAD = "| key | values | default | |\n|---|---|---|---|"


def reference() -> str:
    """The document."""
    parts = [_HEAD, _top_level()]
    for name, field in RunConfig.model_fields.items():
        if table := _table_of(field):
            parts.append(_section(name, table))
    parts.append(_section("finetune.adapter", AdapterTable))
    parts.append(_section("finetune.dpo", DpoTable))
    parts.append(_section("finetune.grpo", GrpoTable))
    parts.append(_section("model.config", ModelConfig))
    return "\n".join(parts)


def _table_of(field: FieldInfo) -> type[BaseModel] | None:
    """The table that a field is, also one that may be left out; None for a plain value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            return kind
    return None


def _top_level() -> str:
    rows = [
        _row(name, field)
        for name, field in RunConfig.model_fields.items()
        if _table_of(field) is None
    ]
    about = inspect.getdoc(RunConfig) or ""
    return "\n".join(["## Top level", "", _one_line(about), "", _TABLE_HEAD, *rows, ""])


def _section(name: str, table: type[BaseModel]) -> str:
    about = _one_line(inspect.getdoc(table) or "")
    rows = [_row(key, field) for key, field in table.model_fields.items()]
    return "\n".join([f"## {name}", "", about, "", _TABLE_HEAD, *rows, ""])


def _row(key: str, field: FieldInfo) -> str:
    values = [_type_text(field.annotation)]
    values += [
        f"{words} {getattr(rule, name)}"
        for rule in field.metadata
        for name, words in {**_LIMITS, "multiple_of": "multiple of"}.items()
        if hasattr(rule, name)
    ]
    default = field.get_default(call_default_factory=True)
    shown = "" if field.is_required() else _default_text(default)
    cells = [f"`{key}`", ", ".join(values), shown, field.description or ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type_text(annotation: Any) -> str:
    """`int`, `adamw or muon`, `list of text`: a type as a user would say it."""
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    origin = get_origin(annotation)
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}"
    if origin is dict:
        return "tables"
    if inspect.isclass(annotation):
        return "table"
    if all(not isinstance(a, type) and get_origin(a) is None for a in arguments):
        return " or ".join(f"`{a}`" for a in arguments)
    return " or ".join(_type_text(a) for a in arguments)


def _default_text(value: Any) -> str:
    if value is None or value in ("", {}):
        return ""
    if isinstance(value, BaseModel):
        return "its own"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> int:
    text = reference()
    if "--check" in sys.argv[1:]:
        is_current = TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text
        print(f"{TARGET.name}: {'up to date' if is_current else 'out of date; run this tool'}")
        return 0 if is_current else 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
