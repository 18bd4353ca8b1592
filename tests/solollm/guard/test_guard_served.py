"""The guard on a server, its settings file, and its measurement."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from solollm.cli import command
from solollm.errors import ConfigError
from solollm.guard.guard import Guard
from solollm.guard.settings import read_settings
from solollm.testing.scripted_server import ScriptedServer, ScriptedTokenEngine
from solollm.tokenizer import Tokenizer
from solollm.tokenizer_training import train_tokenizer

ANSWER = "Write to mira.novak@kestrel.io, or dial +44 20 7946 0958. " + "Then wait a while. " * 60


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    template = b"{% for m in messages %}{{ m.content }}\n{% endfor %}"
    files = {**train_tokenizer([ANSWER], 270).files(), "chat_template.jinja": template}
    engine = ScriptedTokenEngine(Tokenizer(files), lambda prompt, job: ANSWER)
    guard = Guard()
    running = ScriptedServer({"m": engine}, filters=guard, interventions=guard.notices.counts)
    yield running
    running.close()


def ask(server: ScriptedServer, message: str, **fields: object) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": message}], **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_streamed_and_whole_answers_are_guarded_alike(server: ScriptedServer) -> None:
    """A filter that only one of the two ways passes."""
    whole = ask(server, "hello", max_tokens=2000).json()["choices"][0]
    assert whole["finish_reason"] == "content_filter"
    text = whole["message"]["content"]
    assert text.startswith("Write to [email], or dial [phone number]. Then wait a while.")
    assert len(text) < 400
    lines = ask(server, "hello", max_tokens=2000, stream=True).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == text
    assert choices[-1]["finish_reason"] == "content_filter"


def counts(server: ScriptedServer) -> dict[tuple[str, str, str], float]:
    """What `/metrics` says of the guard, by part, rule and action."""
    page = httpx.get(f"{server.url}/metrics", timeout=60).text
    line = re.compile(r"solollm_guard_interventions_total{([^}]*)} (\S+)")
    found = {}
    for labels, count in line.findall(page):
        named = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[named["part"], named["rule"], named["action"]] = float(count)
    return found


def test_metrics_count_what_was_done(server: ScriptedServer) -> None:
    """A guard whose owner cannot see whether it ever does anything; somebody's text as a label."""
    before = counts(server)
    ask(server, "hello", max_tokens=2000)
    ask(server, "hello", max_tokens=2000, stream=True)
    ask(server, "I want to kill myself")
    after = counts(server)
    done = {key: count - before.get(key, 0) for key, count in after.items()}
    assert done == {
        ("personal data", "email", "mask"): 2,
        ("personal data", "phone", "mask"): 2,
        ("repetition", "loop", "block"): 2,
        ("distress", "help lines", "block"): 1,
    }


def test_log_probabilities_would_tell_what_is_hidden(server: ScriptedServer) -> None:
    """A mask around which anybody can read."""
    refused = ask(server, "hello", logprobs=True)
    assert refused.status_code == 400
    assert "--guard off" in refused.json()["error"]["message"]


def test_settings_are_read_and_mistakes_named(tmp_path: Path) -> None:
    """A misspelt setting that leaves a guard open."""
    (tmp_path / "words.txt").write_text("blue bird  # the project\n\nred bird\n")
    path = tmp_path / "guard.toml"
    path.write_text(
        '[personal]\nkinds = ["email"]\n[repetition]\nenabled = false\n'
        '[[rules]]\nname = "birds"\nwords_file = "words.txt"\naction = "block"\n'
    )
    settings = read_settings(path)
    assert settings.rules[0].words == ("blue bird", "red bird")
    assert settings.personal.kinds == ("email",)
    for text, named in [
        ("[personal]\nkind = 1", "kinds"), ("[[rules]]\nname='x'", "needs words"),
        ("[[rules]]\nname='x'\npattern='a'\naction='mark'", "mask"), ("[[", "guard.toml"),
        ("[[rules]]\nname='x'\nwords_file='none.txt'", "none.txt"),
    ]:  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match=named):
            read_settings(path)


def test_eval_guard_prints_every_class() -> None:
    """A measurement that leaves a class out, or says that it holds when it does not."""
    result = CliRunner().invoke(command, ["eval", "guard", "--count", "4", "--seed", "3", "--json"])
    found = json.loads(result.stdout)
    names = {score["name"] for score in found["classes"]}
    assert names == {
        "email",
        "phone",
        "card",
        "iban",
        "id_number",
        "key",
        "distress",
        "loop",
        "rules",
    }
    for score in found["classes"]:
        assert score["holds"] == (score["recall"] >= 0.9 and score["false_rate"] <= 0.02)
    assert found["latency"]["num_chunks"] > 500
    assert result.exit_code == (0 if found["holds"] else 1)


def test_eval_without_a_subcommand_is_of_a_model() -> None:
    """`solollm eval RUN` broken by the subcommand beside it."""
    result = CliRunner().invoke(command, ["eval", "--help"])
    assert result.exit_code == 0
    assert "RUN_OR_CHECKPOINT" in result.output
    assert "--mmlu" in result.output
