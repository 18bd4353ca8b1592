"""Who may call what: every route, with every key, under every name, from every page."""

from __future__ import annotations

import asyncio
import base64
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from solollm.errors import ConfigError
from solollm.serving.access import AccessRules
from solollm.serving.app import Front, build_app
from solollm.serving.limits import Limits
from solollm.serving.metrics import Metrics
from solollm.serving.server import ModelSource, ServeOptions, open_catalogue

KEY = "k" * 20 + "-A1_" + "z" * 20
PAGE = "https://my.page"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}

# What each route says to a caller who may; the engine is not running here.
ROUTES = {
    ("GET", "/"): 200,
    ("GET", "/health"): 503,
    ("GET", "/metrics"): 200,
    ("GET", "/v1/models"): 200,
    ("GET", "/v1/models/tiny"): 200,
    ("POST", "/v1/chat/completions"): 503,
    ("POST", "/v1/completions"): 503,
    ("GET", "/elsewhere"): 404,
    ("GET", "/v1/chat/completions"): 405,
}
KEYS = {
    "none": None,
    "bad": f"Bearer {KEY[:-1]}",
    "longer": f"Bearer {KEY}z",
    "empty": "Bearer ",
    "good": f"Bearer {KEY}",
    "basic": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode(),
    "bad basic": "Basic " + base64.b64encode(b"me:guess").decode(),
    "no base64": "Basic !!",
}
GOOD_KEYS = ("good", "basic")
HOSTS: dict[str, list[str]] = {
    "loopback": ["127.0.0.1:8000"], "localhost": ["localhost"], "IPv6": ["[::1]:8000"],
    "evil": ["evil.example"], "rebound": ["127.0.0.1.evil.example:8000"], "IP": ["10.0.0.7:8000"],
    "listed": ["box.local:8000"], "none": [], "empty": [""],
    "twice": ["127.0.0.1:8000", "evil.example"],
}  # fmt: skip
SERVERS = {
    "open": (AccessRules(origins=(PAGE,)), ("loopback", "localhost", "IPv6")),
    "with key": (AccessRules(key=KEY, origins=(PAGE,)), ("loopback", "localhost", "IPv6")),
    "on the network": (
        AccessRules(host="0.0.0.0", key=KEY, hosts=("box.local",), origins=(PAGE,)),
        ("IP", "IPv6", "listed", "loopback"),  # addresses, and the listed name
    ),
}


def origin_of(kind: str, host: list[str]) -> str | None:
    own = f"http://{host[0]}" if host else "http://localhost"
    return {"none": None, "own": own, "evil": "https://evil.example", "null": "null",
            "listed": PAGE, "neighbour": "http://localhost:3000"}[kind]  # fmt: skip


def expected(
    server: str, route: tuple[str, str], key: str, host: str, origin: str
) -> tuple[int, str | None]:
    """(status, error code or None) by the rules as the guide words them."""
    rules, names = SERVERS[server]
    if host in ("none", "empty", "twice"):
        return 400, "host_missing"
    if host not in names:
        return 403, "host_not_allowed"
    if origin in ("evil", "null", "neighbour"):
        return 403, "origin_not_allowed"
    if rules.key and route[1] != "/health" and key not in GOOD_KEYS:
        return 401, "missing_api_key" if key in ("none", "no base64") else "invalid_api_key"
    return ROUTES[route], None


async def call(
    app: Any, method: str, path: str, headers: list[tuple[str, str]]
) -> tuple[int, dict[str, str], bytes]:
    """One request straight into the application, with exactly these headers."""
    body = json.dumps(CHAT if "chat" in path else {"model": "tiny", "prompt": "x"}).encode()
    raw = [(n.encode(), v.encode()) for n, v in [*headers, ("content-type", "application/json")]]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "scheme": "http", "headers": raw, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        "state": {},
    }  # fmt: skip
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    found = {n.decode(): v.decode() for n, v in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


@pytest.fixture(scope="module")
def front(served_checkpoint: Path) -> Front:
    catalogue, _ = open_catalogue([ModelSource(served_checkpoint, "tiny")], ServeOptions())
    return Front(catalogue, Limits(), Metrics())


@pytest.mark.parametrize("server", SERVERS)
def test_every_route_key_host_and_origin(server: str, front: Front) -> None:
    """One combination that lets somebody in, or an owner out; a refusal that repeats the key."""
    app = build_app(front, SERVERS[server][0])
    origins = ("none", "own", "evil", "null", "listed", "neighbour")
    table = list(product(ROUTES, KEYS, HOSTS, origins))
    assert len(table) > 4000

    async def run() -> None:
        for route, key, host, origin in table:
            headers = [("host", name) for name in HOSTS[host]]
            page = origin_of(origin, HOSTS[host])
            headers += [("origin", page)] if page else []
            headers += [("authorization", KEYS[key])] if KEYS[key] else []  # type: ignore[list-item]
            status, answered, body = await call(app, *route, headers)
            case = (server, route, key, host, origin)
            wanted, code = expected(*case)
            assert status == wanted, case
            if code is not None:
                assert json.loads(body)["error"]["code"] == code, case
                assert answered["connection"] == "close", case
            allowed = PAGE if origin == "listed" and wanted not in (400, 403) else None
            assert answered.get("access-control-allow-origin") == allowed, case
            assert KEY.encode() not in body

    asyncio.run(run())


def test_preflights_are_answered_for_listed_pages_alone(front: Front) -> None:
    """A page that is let in but cannot send its key, or CORS for everyone."""
    app = build_app(front, SERVERS["with key"][0])
    host = ("host", "localhost:8000")
    path = "/v1/chat/completions"
    listed = asyncio.run(call(app, "OPTIONS", path, [host, ("origin", PAGE)]))
    assert listed[0] == 204
    assert "authorization" in listed[1]["access-control-allow-headers"]
    evil = asyncio.run(call(app, "OPTIONS", path, [host, ("origin", "https://evil.example")]))
    assert evil[0] == 403
    assert "access-control-allow-origin" not in evil[1]
    assert asyncio.run(call(app, "OPTIONS", path, [host]))[0] == 401


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": "192.168.1.5"},
        {"host": "box.local"},
        {"key": "x" * 31},
        {"key": "x" * 31 + "é"},
        {"key": "x" * 31 + " " + "x"},
        {"origins": ("*",)},
        {"origins": ("https://a/b",)},
        {"origins": ("file://",)},
    ],
)
def test_unsafe_settings_are_refused(settings: dict[str, Any]) -> None:
    """A server open to the network without a key, because somebody wanted it quickly."""
    with pytest.raises(ConfigError):
        AccessRules(**settings)
    assert AccessRules(host="0.0.0.0", key="x" * 32)
