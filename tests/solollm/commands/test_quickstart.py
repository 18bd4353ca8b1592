"""`solollm quickstart` before it starts, and how it is told."""

from __future__ import annotations

from pathlib import Path

from solollm.commands.quickstart import free_folder


def test_a_second_quickstart_takes_the_next_folder(tmp_path: Path) -> None:
    """A story that was stopped by Ctrl-C and can only be begun again after `rm -r`."""
    wanted = tmp_path / "quickstart"
    assert free_folder(wanted) == wanted
    wanted.mkdir()
    assert free_folder(wanted) == wanted
    (wanted / "run").mkdir()
    (tmp_path / "quickstart-2").write_text("a file")
    assert free_folder(wanted) == tmp_path / "quickstart-3"
