"""The command line's frame: lazy commands, exit codes, errors in three parts."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from solollm.cli import COMMANDS, LazyGroup, command, main
from solollm.commands.errors_shown import explain, show_error
from solollm.errors import ConfigError, IntegrityError, StoppedBySignal


def _run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "solollm", *words], capture_output=True, text=True, timeout=60,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Makes `solollm doctor` raise the exception put into the list."""
    planned: list[BaseException] = []

    @click.command("doctor")
    @click.option("--json", "as_json", is_flag=True)
    def doctor(as_json: bool) -> None:
        raise planned[0]

    monkeypatch.setattr(
        LazyGroup, "get_command", lambda self, ctx, name: doctor if name == "doctor" else None
    )
    return planned


def test_help_names_every_command() -> None:
    """A command registered in the table but missing from the page."""
    text = _run("--help").stdout
    for name, short_help in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(short_help)}$", text, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_loads_and_shows_an_example(name: str) -> None:
    """A command that is announced but cannot be imported, or that has no example."""
    context = click.Context(command, info_name="solollm")
    loaded = command.get_command(context, name)
    assert loaded is not None
    text = loaded.get_help(click.Context(loaded, info_name=name, parent=context))
    assert "Example" in text
    if isinstance(loaded, click.Group):
        for sub_name, sub in loaded.commands.items():
            sub_text = sub.get_help(click.Context(sub, info_name=sub_name, parent=context))
            assert "Example" in sub_text, f"solollm {name} {sub_name} --help shows no example"


def test_unknown_command_names_the_nearest_and_exits_2() -> None:
    """`solollm pretrian` answered with a bare 'no such command'."""
    done = _run("pretrian")
    assert done.returncode == 2
    assert "did you mean `pretrain`?" in done.stderr
    assert done.stdout == ""


def test_an_error_has_its_three_parts_and_its_exit_code(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """The why or the fix lost on the way to the terminal; a path wrapped in the middle."""
    path = "runs/" + "a-long-name/" * 20
    failing.append(IntegrityError(f"{path} is damaged", why="its digest differs", fix="restore it"))
    assert main(["doctor"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    expected = [f"{path} is damaged", "  why: its digest differs", "  fix: restore it"]
    assert err.splitlines() == expected


def test_json_error_goes_to_standard_output(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine reading --json met with prose."""
    failing.append(ConfigError("bad [bold]key[/bold]", fix="fix it"))
    assert main(["doctor", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"] == {
        "kind": "ConfigError", "what": "bad [bold]key[/bold]", "why": "", "fix": "fix it",
        "exit_code": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (StoppedBySignal("stopped", signal_number=15), 143),
        (MemoryError(), 1),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 74),
        (click.UsageError("no such option"), 2),
        (ValueError("a bug"), 1),
        (SystemExit(7), 7),
    ],
)
def test_exit_codes(failing: list[BaseException], error: BaseException, code: int) -> None:
    """An ending without its documented exit code."""
    failing.append(error)
    if isinstance(error, SystemExit):
        with pytest.raises(SystemExit, match="7"):
            main(["doctor"])
    else:
        assert main(["doctor"]) == code


def test_an_unexpected_exception_leaves_a_traceback_file_and_a_short_message(
    failing: list[BaseException],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Sixty lines of traceback thrown at a user, or no trace of the bug at all."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing.append(ZeroDivisionError("planted"))
    main(["doctor"])
    shown = capsys.readouterr().err
    (report,) = tmp_path.glob("solollm-*.traceback.txt")
    assert len(shown.splitlines()) == 3
    assert str(report) in shown
    assert "in doctor\n" in report.read_text()


def test_debug_variable_shows_the_traceback(
    failing: list[BaseException],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SOLOLLM_DEBUG=1 without effect."""
    monkeypatch.setenv("SOLOLLM_DEBUG", "1")
    failing.append(ConfigError("bad key"))
    assert main(["doctor"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_no_color_means_no_escape_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_COLOR that removes colours but leaves bold."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_error(ConfigError("what", why="why", fix="fix"))
    assert "\x1b[" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    show_error(ConfigError("what", why="why", fix="fix"))
    assert "\x1b" not in capsys.readouterr().err


def test_a_closed_pipe_is_quiet() -> None:
    """`solollm --help | head -0` ending in a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "solollm", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error_text = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) in (0, 1)
    assert error_text == b""


def test_memory_error_names_the_setting_to_lower() -> None:
    """Out of memory reported as a bug."""
    assert "micro_batch_size" in explain(MemoryError()).fix


def test_shell_completion_offers_the_commands() -> None:
    """Completion broken by the lazy table."""
    done = _run(_SOLOLLM_COMPLETE="bash_complete", COMP_WORDS="solollm do", COMP_CWORD="1")
    assert "plain,doctor" in done.stdout
