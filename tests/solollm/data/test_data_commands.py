"""`solollm data build|mix|report|inspect`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from solollm.cli import main
from solollm.commands.data import command


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.md").write_text(f"# Note {number}\n\nSome [bold]words[/bold].\n" * 3)
    (folder / "bad.md").write_bytes(b"\xff")
    return folder


def _run(*words: str | Path) -> str:
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_build_report_and_inspect_tell_the_same_story(notes: Path, tmp_path: Path) -> None:
    """Guards the commands' wiring from sources to rows, in words and in JSON."""
    out = tmp_path / "corpus"
    built = json.loads(_run("build", notes, "--out", out, "--vocab-size", "300", "--json"))
    assert (built["items"], built["kept"], built["broken"]["not UTF-8"]["count"]) == (41, 40, 1)
    reported = json.loads(_run("report", out, "--verify", "--json"))
    assert reported.pop("verified") is True
    assert built == {"corpus": str(out), **reported}
    words = _run("report", out, "--verify")
    assert "41 items in: 40 kept" in words
    assert "every byte matches" in words
    documents = json.loads(_run("inspect", out, "--document", "1", "--count", "2", "--json"))
    assert [view["number"] for view in documents] == [1, 2]
    assert documents[0]["text"].startswith("# Note")
    shown = _run("inspect", out, "--batch", "0", "--seq-len", "200", "--rows", "3")
    assert "=== step 0, row 2" in shown
    assert "--- border ---\n<|bos|># Note" in shown
    assert "[bold]words[/bold]" in shown
    rows = json.loads(_run("inspect", out, "--batch", "0", "--rows", "3", "--json"))
    assert len(rows) == 3
    words = _run("build", notes, "--out", out, "--vocab-size", "300", "--overwrite")
    assert f"solollm pretrain --corpus {out} --run runs/corpus" in words
    assert "not UTF-8" in words


def test_what_is_broken_steers_no_terminal(notes: Path, tmp_path: Path) -> None:
    """Guards the screen: a file's name, and its content, may clear it or name its window."""
    (notes / "\x1b]0;mine\x07.md").write_bytes(b"\xff")
    (notes / "rows.jsonl").write_text("{\x1b[2J\n")
    words = _run("build", notes, "--out", tmp_path / "corpus", "--vocab-size", "300")
    words += _run("report", tmp_path / "corpus")
    assert "]0;mine" in words
    assert "[2J" in words
    assert not {"\x1b", "\x07"} & set(words)


def test_a_ready_tokenizer_is_used(notes: Path, tmp_path: Path) -> None:
    """Guards second corpora for the decay stage: the same ids as the first."""
    _run("build", notes, "--out", tmp_path / "a", "--vocab-size", "300", "--json")
    ready = tmp_path / "a" / "tokenizer"
    _run("build", notes, "--out", tmp_path / "b", "--tokenizer", ready, "--json")
    first, second = (json.loads(_run("report", tmp_path / n, "--json")) for n in "ab")
    assert first == second


def test_mix_says_what_each_corpus_gave(notes: Path, tmp_path: Path) -> None:
    """Guards the command's wiring: weights and tokens from the words, the table, and a result that
    the other commands take."""
    _run("build", notes, "--out", tmp_path / "a=1", "--vocab-size", "300", "--json")
    for path in notes.glob("*.md"):
        path.write_text(f"another {path.stem}\n")
    ready = tmp_path / "a=1" / "tokenizer"
    _run("build", notes, "--out", tmp_path / "b", "--tokenizer", ready, "--json")
    parts, out = (tmp_path / "a=1", f"{tmp_path / 'b'}=3"), tmp_path / "mixed"
    made = json.loads(_run("mix", *parts, "--out", out, "--tokens", "2e3", "--json"))
    assert made["corpus"] == str(out)
    assert [(part["name"], part["weight"]) for part in made["parts"]] == [
        ("b", 0.75),
        ("a=1", 0.25),
    ]
    assert made["splits"]["train"]["tokens"] == pytest.approx(2000, rel=0.1)
    reported = json.loads(_run("report", out, "--verify", "--json"))
    assert reported["parts"] == made["parts"]
    words = _run("mix", *parts, "--out", out, "--overwrite")
    assert "asked   given" in words
    assert f"solollm pretrain --corpus {out} --run runs/mixed" in words
    assert "passes" in _run("report", out)
    assert "--- document 0" in _run("inspect", out)


def test_mixing_ends_with_the_documented_exit_codes(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards scripts: 2 for what cannot be mixed, 3 for damage, with the file's name."""
    corpus, out = tmp_path / "a", str(tmp_path / "mixed")
    _run("build", notes, "--out", corpus, "--vocab-size", "300", "--json")
    assert main(["data", "mix", f"{corpus}=much", "--out", out]) == 2
    assert main(["data", "mix", f"{corpus}=-1", "--out", out]) == 2
    assert main(["data", "mix", str(corpus), str(corpus), "--out", out, "--json"]) == 2
    assert "the same corpus" in json.loads(capsys.readouterr().out)["error"]["what"]
    shard = corpus / "train" / "tokens-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert main(["data", "mix", str(corpus), "--out", out, "--json"]) == 3
    assert str(shard) in json.loads(capsys.readouterr().out)["error"]["what"]


def test_exit_codes_are_the_documented_ones(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards scripts: 2 for a wrong source, 5 for nothing left, 3 for damage."""
    assert main(["data", "build", str(tmp_path / "nope"), "--out", str(tmp_path / "c")]) == 2
    assert "does not exist" in capsys.readouterr().err
    bad = str(notes / "bad.md")
    assert main(["data", "build", bad, "--out", str(tmp_path / "c"), "--json"]) == 5
    assert "not UTF-8" in json.loads(capsys.readouterr().out)["error"]["why"]
    _run("build", notes, "--out", tmp_path / "c", "--vocab-size", "300")
    shard = tmp_path / "c" / "train" / "tokens-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert main(["data", "report", str(tmp_path / "c"), "--verify"]) == 3


@pytest.mark.parametrize("name", ["build", "mix", "report", "inspect"])
def test_each_help_has_an_example(name: str) -> None:
    """Guards the promise of every --help."""
    assert f"solollm data {name} " in _run(name, "--help").partition("Example")[2]


def test_help_loads_nothing_heavy() -> None:
    """Guards the command line's speed: --help of the group imports neither NumPy nor pyarrow."""
    code = (
        "import sys; from solollm.commands.data import command;"
        "print(sorted({'numpy', 'pyarrow', 'datasets', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


def test_contamination_of_a_corpus_and_of_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards both kinds of training text, the words, JSON and what cannot be read."""
    asked = "How many of the nine boats in the harbour at noon had left it by the evening?"
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": asked}) + "\n")
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(5):
        (notes / f"{number}.txt").write_text(f"text {number} of no interest " * 20)
    (notes / "quiz.txt").write_text(f"Quiz: {asked} Four.")
    corpus = str(tmp_path / "c")
    words = ["data", "build", str(notes), "--out", corpus, "--validation-fraction", "0"]
    assert main([*words, "--vocab-size", "512"]) == 0
    capsys.readouterr()
    benchmark = str(tmp_path / "test.jsonl")
    assert main(["data", "contamination", corpus, benchmark]) == 0
    shown = capsys.readouterr().out
    assert "100.00%" in shown
    assert f"in 1 document: {asked}" in shown
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Four."}]
    other = {"prompt": "Say yes.", "completion": "Yes."}
    rows.write_text("".join(json.dumps(r) + "\n" for r in ({"messages": turns}, other)) * 2)
    assert main(["data", "contamination", str(rows), benchmark, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["held"] == [{"item": 0, "documents": 2, "beginning": asked}]
    assert main(["data", "contamination", str(rows), benchmark]) == 0
    assert f"in 2 rows: {asked}" in capsys.readouterr().out
    assert main(["data", "contamination", str(tmp_path / "nowhere"), benchmark]) == 2
    rows.write_text('{"messages": [}')
    assert main(["data", "contamination", str(rows), benchmark]) == 5
    assert "rows.jsonl:1 is no JSON" in capsys.readouterr().err
