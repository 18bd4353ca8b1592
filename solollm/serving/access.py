"""Who may speak to the server: Host, Origin and key, checked before anything else is looked at.

A web page must not reach a model on this machine: a page from elsewhere shows in `Origin`, and one
that got this machine's address under its own name (DNS rebinding) shows in `Host`. Off this machine
a key is needed on top. `/health` alone answers without the key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from solollm.errors import ConfigError
from solollm.serving.api_errors import ApiError

MIN_KEY_CHARS = 32
OPEN_PATH = "/health"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a socket bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class AccessRules:
    """Attributes:
        host: the address that the server is bound to.
        key: what clients must send; empty: nothing.
        hosts: further names under which clients may call it (`Host`), without port.
        origins: web pages that may call it, as `scheme://host[:port]`.

    Raises:
        ConfigError: an open address without a key, a short key, a malformed origin.
    """

    host: str = "127.0.0.1"
    key: str = ""
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.key and len(self.key) < MIN_KEY_CHARS:
            raise ConfigError(
                f"the key has {len(self.key)} characters; {MIN_KEY_CHARS} are needed",
                why="a short key can be guessed",
                fix="make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            raise ConfigError("the key holds characters that no HTTP header carries")
        if not self.key and not is_loopback(self.host):
            raise ConfigError(
                f"{self.host} can be reached from other machines, and there is no key",
                why="anyone on the network could use the model",
                fix="give --key-file, or set SOLOLLM_API_KEY; or stay on 127.0.0.1",
            )
        for origin in self.origins:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ConfigError(
                    f"{origin!r} is no origin", fix="write it as https://name or http://name:port"
                )  # fmt: skip

    def check_host(self, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """The Host header, if the server may be called so. Raises ApiError."""
        given = [value for name, value in headers if name == b"host"]
        if len(given) != 1 or not given[0]:
            raise ApiError(400, "one Host header is needed", code="host_missing", closes=True)
        host = given[0].decode("latin-1").lower()
        if self._host_name(host) not in self._names() and not self._is_own_address(host):
            raise ApiError(
                403, "this server is not called by that name; start it with --allow-host NAME",
                code="host_not_allowed", closes=True,
            )  # fmt: skip
        return host

    def check_origin(self, headers: Sequence[tuple[bytes, bytes]], host: str) -> str | None:
        """The origin to allow by CORS, None where the page is this server's own or no page calls.
        Raises ApiError for a page from elsewhere."""
        given = [value for name, value in headers if name == b"origin"]
        if not given:
            return None
        origin = given[0].decode("latin-1").lower()
        if len(given) == 1 and origin in self.origins:
            return origin
        if len(given) == 1 and origin in (f"http://{host}", f"https://{host}"):
            return None
        raise ApiError(
            403, "web pages from elsewhere may not call this server; --allow-origin lets one in",
            code="origin_not_allowed", closes=True,
        )  # fmt: skip

    def check_key(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Raises ApiError 401 unless the key is right, or none is needed."""
        if not self.key:
            return
        given = [value for name, value in headers if name == b"authorization"]
        sent = _sent_key(given[0].decode("latin-1")) if len(given) == 1 else None
        if sent is None:
            raise ApiError(
                401, "a key is needed: Authorization: Bearer KEY",
                code="missing_api_key", closes=True,
            )  # fmt: skip
        # Digests of equal length, so that the time tells nothing of the key, nor of its length.
        if not hmac.compare_digest(_digest(sent), _digest(self.key)):
            raise ApiError(401, "the key is wrong", code="invalid_api_key", closes=True)

    def _names(self) -> set[str]:
        own = {self.host.lower(), f"[{self.host.lower()}]", *(h.lower() for h in self.hosts)}
        return own | set(_LOOPBACK_NAMES) if is_loopback(self.host) else own

    def _is_own_address(self, host: str) -> bool:
        """A bare address cannot be a rebound name; away from loopback it may be one of ours."""
        if is_loopback(self.host):
            return False
        try:
            ipaddress.ip_address(self._host_name(host).strip("[]"))
        except ValueError:
            return False
        return True

    @staticmethod
    def _host_name(host: str) -> str:
        name, colon, port = host.rpartition(":")
        return name if colon and port.isdigit() and not host.endswith("]") else host


class AccessControl:
    """ASGI: lets through what `AccessRules` allow, and answers the preflights of allowed pages."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from solollm.serving.http import json_response  # starlette loads only in a server

        headers = scope["headers"]
        page: str | None = None
        try:
            host = self._rules.check_host(headers)
            page = self._rules.check_origin(headers, host)
            if page and scope["method"] == "OPTIONS":
                await _preflight(send, page)
                return
            if scope["path"] != OPEN_PATH:
                self._rules.check_key(headers)
        except ApiError as error:
            answer = json_response(error.body(), status=error.status, headers=error.headers())
            await answer(scope, receive, _allowing(send, page))
            return
        await self._app(scope, receive, _allowing(send, page))


def _allowing(send: Send, page: str | None) -> Send:
    """Names the allowed page in the response's headers."""
    if page is None:
        return send

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_page_headers(page)]
        await send(message)

    return sending


async def _preflight(send: Send, page: str) -> None:
    headers = [
        *_page_headers(page),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _page_headers(page: str) -> list[tuple[bytes, bytes]]:
    return [(b"access-control-allow-origin", page.encode()), (b"vary", b"origin")]


def _sent_key(authorization: str) -> str | None:
    """The key of a Bearer header, or the password of a Basic one."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return None
    try:
        pair = base64.b64decode(value.strip(), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return pair.partition(":")[2]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
