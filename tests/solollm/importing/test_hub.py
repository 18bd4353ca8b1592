"""The real download, from a hub on this machine: what is asked for, what the cache then holds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from solollm.architecture import ModelConfig
from solollm.export import export_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = ModelConfig(
    vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
)  # fmt: skip


class Hub(ThreadingHTTPServer):
    """The few addresses of the Hugging Face hub that a snapshot needs, over one folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.served: list[str] = []
        self.tokens: set[str | None] = set()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET(with_body=False)

    def do_GET(self, *, with_body: bool = True) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            self.server.tokens.add(self.headers.get("Authorization"))
        names = sorted(p.name for p in self.server.folder.iterdir())
        if path.startswith("/api/models/some/model/revision/"):
            self._send(json.dumps({"id": "some/model", "sha": COMMIT}).encode(), with_body)
        elif path.startswith("/api/models/some/model/tree/"):
            entries = [
                {"type": "file", "path": n, "oid": "0" * 40, "size": len(self._read(n))}
                for n in names
            ]
            self._send(json.dumps(entries).encode(), with_body)
        elif path.startswith(f"/some/model/resolve/{COMMIT}/") and path.split("/")[-1] in names:
            name = path.split("/")[-1]
            self.server.served.append(name)
            self._send(self._read(name), with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def _read(self, name: str) -> bytes:
        return (self.server.folder / name).read_bytes()

    def _send(self, content: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, save_telling: Callable[[Path, ModelConfig], Path]) -> Iterator[Hub]:
    export_model(save_telling(tmp_path, SMALL), tmp_path / "published")
    (tmp_path / "published" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "published" / "modeling_evil.py").write_text("raise SystemExit")
    server = Hub(tmp_path / "published")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run(hub: Hub, home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its settings when imported."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "solollm", *words], capture_output=True, text=True, timeout=60,
        env=clean | settings | environment,
    )  # fmt: skip


def test_a_model_is_downloaded_imported_and_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    """What no fake of a function shows: the cache's links, the token, the patterns at work, and
    that HF_HUB_OFFLINE=1 finds what was downloaded."""
    home = tmp_path / "home"
    done = run(
        hub, home, "import", "some/model", "--out", str(tmp_path / "one"), HF_TOKEN="hf_secret"
    )
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin" not in hub.served
    assert "modeling_evil.py" not in hub.served
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.served)
    assert hub.tokens == {"Bearer hf_secret"}
    snapshot = home / "hub" / "models--some--model" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").is_symlink()
    origin = json.loads((tmp_path / "one" / "origin.json").read_text())
    assert origin == {"name": "some/model", "revision": COMMIT, "weights": "float32"}

    hub.served.clear()
    words = ("import", "some/model", "--out", str(tmp_path / "two"))
    again = run(hub, home, *words, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert not hub.served
    first, second = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_offline_without_a_copy_says_so(hub: Hub, tmp_path: Path) -> None:
    """A traceback, or a wait for a network that is switched off."""
    words = ("import", "some/model", "--out", str(tmp_path / "one"))
    done = run(hub, tmp_path / "home", *words, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "some/model could not be downloaded" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "Traceback" not in done.stderr
    missing = run(hub, tmp_path / "home", "import", "no/such", "--out", str(tmp_path / "one"))
    assert missing.returncode == 2
    assert "the hub has no no/such" in missing.stderr
