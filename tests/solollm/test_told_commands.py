"""The commands that messages tell to type can be typed."""

from __future__ import annotations

import shlex
from pathlib import Path

from click.testing import CliRunner

from solollm.cli import command
from solollm.errors import quoted


def test_a_path_is_quoted_where_it_has_to_be() -> None:
    """Plain paths stay as they are, since most are, and quotes are ugly."""
    assert quoted(Path("runs/first")) == "runs/first"
    assert shlex.split(f"solollm resume {quoted('runs/läuft 1')}")[2:] == ["runs/läuft 1"]
    assert quoted(Path("-m v/runs/a")) == "'./-m v/runs/a'"  # no option of the command


def test_a_corpus_in_a_folder_with_a_blank_is_trained_on_as_told(tmp_path: Path) -> None:
    """`solollm pretrain --corpus my corpus` is another command."""
    (tmp_path / "my notes.txt").write_text("one note after the other\n" * 50)
    words = ["data", "build", str(tmp_path / "my notes.txt"), "--out", str(tmp_path / "my corpus")]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    told = done.output.strip().splitlines()[-1]
    assert shlex.split(told) == [
        "solollm", "pretrain", "--corpus", str(tmp_path / "my corpus"), "--run", "runs/my corpus",
    ]  # fmt: skip
