"""The documents keep up with the code: commands exist, links lead somewhere, tables are current."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from solollm.cli import command

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_CODE = re.compile(r"^(?:    |\$ )(solollm .*)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def _documented_commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for line in _CODE.findall(text):
            found.append((path.relative_to(ROOT).as_posix(), line.split("  #")[0].strip()))
    return found


def test_there_are_documented_commands() -> None:
    """The search below silently finding nothing."""
    assert len([line for name, line in _documented_commands() if name == "README.md"]) >= 8


@pytest.mark.parametrize(("document", "line"), _documented_commands())
def test_a_documented_command_is_understood(document: str, line: str) -> None:
    """A flag renamed in the code and not in the README."""
    context, current = click.Context(command, info_name="solollm"), command
    words = shlex.split(line)[1:]
    while isinstance(current, click.Group):
        found = current.get_command(context, words.pop(0))
        assert found is not None, f"{document}: no such command: {line}"
        context, current = click.Context(found, parent=context), found
    options = {name for option in current.params for name in (*option.opts, *option.secondary_opts)}
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    assert used <= options, f"{document}: {line}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(path: Path) -> None:
    """A file moved, and the tour still pointing at its old place."""
    for target in _LINK.findall(path.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), target


def test_the_settings_reference_is_current() -> None:
    """A setting added without `python tools/config_reference.py`."""
    tool = ROOT / "tools" / "config_reference.py"
    spec = importlib.util.spec_from_file_location("tools_config_reference", tool)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "reference" / "config.md").read_text(encoding="utf-8")
    assert written == module.reference()
