"""`solollm chat --url`: the same conversation as with a model that is opened here."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from solollm.backend import SamplingParams
from solollm.cli import main
from solollm.errors import BackendError, ConfigError
from solollm.remote_dialogue import RemoteModel, RemoteSession

GREEDY = ("--temperature", "0", "--max-new-tokens", "12")
LONG = "xq zj " * 16
TURNS = (
    "number_7\n\nvalue = 3\n/reset\nnumber_7\n/system return\nvalue\n/nonsense\n/quit\nnot read\n"
)


@pytest.fixture(scope="module")
def url(serving: Callable[..., Any]) -> str:
    return str(serving("torch").url)


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *words: str
) -> tuple[int, str, str]:
    """(exit code, what was said, notices) of a chat whose turns come from a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code = main(["chat", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("mode", ["--chat", "--completion"])
def test_it_says_what_a_local_chat_says(
    url: str, served_checkpoint: Path, mode: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Guards turns laid out otherwise, a history that is not sent, commands that do nothing."""
    words = (mode, *GREEDY)
    here = talk(monkeypatch, capsys, TURNS, str(served_checkpoint), *words)
    there = talk(monkeypatch, capsys, TURNS, "--url", url, *words)
    assert here[0] == there[0] == 0
    assert there[1] == here[1]
    assert len(here[1].split("\n")) >= 5, "four answers"
    assert f"tiny at {url}" in there[2]
    for line in ("unknown command /nonsense", "forgotten"):
        assert line in here[2]
        assert line in there[2]


def test_a_full_context_costs_the_oldest_turns(url: str) -> None:
    """Guards a conversation that ends when the server's context is full."""
    model = RemoteModel(f"{url}/v1/")
    session = RemoteSession(model, mode="chat", sampling=SamplingParams(), max_new_tokens=4)
    session.set_system("return")
    for turn in range(8):
        assert "".join(session.ask(f"turn {turn} " + LONG))
    assert session.messages[0] == {"role": "system", "content": "return"}
    kept = [m["content"].split("xq")[0] for m in session.messages if m["role"] == "user"]
    assert 0 < len(kept) < 8
    assert kept == [f"turn {turn} " for turn in range(8 - len(kept), 8)]
    with pytest.raises(ConfigError, match="context"):
        list(session.ask(LONG * 40))
    assert [m["role"] for m in session.messages] == ["system"], "nothing of it is remembered"
    document = RemoteSession(model, mode="completion", sampling=SamplingParams(), max_new_tokens=4)
    for turn in range(8):
        list(document.ask(f"turn {turn} " + LONG))
    assert "turn 7" in document.text
    assert "turn 0" not in document.text
    model.close()


def test_a_stopped_answer_is_remembered_as_far_as_it_came(
    url: str, serving: Callable[..., Any]
) -> None:
    """Guards Ctrl-C: the server goes on for nobody, or the conversation forgets what it saw."""
    model = RemoteModel(url)
    session = RemoteSession(model, mode="chat", max_new_tokens=300)
    answer = session.ask("value")
    piece = next(answer)
    answer.close()
    assert session.messages[-1] == {"role": "assistant", "content": piece}
    for _ in range(200):
        if serving("torch").metric("solollm_active_sequences") == 0:
            break
        threading.Event().wait(0.05)
    assert serving("torch").metric("solollm_active_sequences") == 0
    model.close()


def test_what_cannot_be_reached_is_one_clear_error(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards tracebacks of sockets, and a name that is answered by another model."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, _, told = talk(monkeypatch, capsys, "", "--url", f"http://127.0.0.1:{port}")
    assert code == 1
    assert f"nothing answers at http://127.0.0.1:{port}" in " ".join(told.split())
    assert "Traceback" not in told
    code, _, told = talk(monkeypatch, capsys, "", "tiy", "--url", url)
    assert code == 2
    assert "`tiny`" in told
    for words, message in (
        (("--url", "127.0.0.1:8000"), "no address"),
        ((), "--url"),
        (("some", "--key-file", str(tmp_path / "k")), "no effect"),
        (("--url", url, "--backend", "torch"), "no effect"),
    ):
        code, _, told = talk(monkeypatch, capsys, "", *words)
        assert (code, message in told) == (2, True), told


class _Strange(BaseHTTPRequestHandler):
    """A server of somebody else's: it wants a key, and says little."""

    answers: list[bytes]

    def do_GET(self) -> None:
        if self.headers.get("authorization") != "Bearer a-key":
            self._send(401, b'{"error": {"message": "who are you", "code": "no_key"}}')
        else:
            self._send(200, b'{"data": [{"id": "other", "owned_by": "x"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._send(200, self.answers.pop(0))

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def strange() -> Iterator[str]:
    _Strange.answers = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Strange)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _events(*documents: object) -> bytes:
    return b"".join(b"data: " + json.dumps(d).encode() + b"\n\n" for d in documents)


def test_any_server_of_this_kind_will_do(strange: str, tmp_path: Path) -> None:
    """Guards fields that only this project's server sends, and answers that break off or are no
    answers."""
    with pytest.raises(ConfigError, match=r"refuses this key.*who are you"):
        RemoteModel(strange)
    model = RemoteModel(strange, key="a-key")
    assert (model.name, model.is_chat) == ("other", True)
    session = RemoteSession(model)
    usage = {"choices": [], "usage": {"completion_tokens": 2}}
    chunks = [{"choices": [{"delta": {"role": "assistant", "content": None}}]},
              {"choices": [{"delta": {"content": "he"}}]}, {"choices": [{"delta": {}}]},
              {"choices": [{"delta": {"content": "llo"}}]}, usage]  # fmt: skip
    _Strange.answers.append(b": ping\n\n" + _events(*chunks) + b"data: [DONE]\n\n")
    assert list(session.ask("hi")) == ["he", "llo"]
    _Strange.answers.append(_events(chunks[1], {"error": {"message": "out of memory"}}))
    with pytest.raises(BackendError, match="broke off: out of memory"):
        list(session.ask("hi"))
    _Strange.answers.append(b"data: no json\n\n")
    with pytest.raises(BackendError, match="not answer in JSON"):
        list(session.ask("hi"))
    model.close()
