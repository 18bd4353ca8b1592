"""Requests made to break a server: each is answered or refused, and the next one is not harmed."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from solollm.serving.schemas import ChatRequest, CompletionRequest

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def post(path: str, body: bytes, *headers: str, host: str = "localhost") -> bytes:
    """The bytes of a POST of JSON; further headers replace the length."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    lines.append("Content-Type: application/json")
    if not any("Length" in header or "Encoding" in header for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(**fields: Any) -> bytes:
    """The JSON of a short completion with these fields changed."""
    return json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 2, **fields}).encode()


def status(answer: bytes) -> int:
    """The status code of raw bytes; 0 where there is none."""
    found = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    return int(found[1]) if found else 0


DEEP = b'{"model": "tiny", "prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
HUGE = b'{"model": "tiny", "prompt": "' + b"x" * 60_000_000 + b'"}'


def _number(text: str) -> bytes:
    return b'{"model": "tiny", "prompt": "x", "max_tokens": %s}' % text.encode()


# name -> (bytes, statuses it may get); 0: closed without an answer
HOSTILE: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "H1 empty prompt": (post(TEXT, completion(prompt="")), (400,)),
    "H1 empty ids": (post(TEXT, completion(prompt=[])), (400,)),
    "H1 no messages": (post(CHAT, b'{"model": "tiny", "messages": []}'), (400,)),
    "H2 bias beyond the vocabulary": (post(TEXT, completion(logit_bias={"999999": 1})), (400,)),
    "H2 bias on a padding row": (post(TEXT, completion(logit_bias={"301": 1})), (400,)),
    "H2 bias key -1": (post(TEXT, completion(logit_bias={"-1": 1})), (400,)),
    "H3 length -1": (post(TEXT, b"{}", "Content-Length: -1"), (400,)),
    "H3 length abc": (post(TEXT, b"{}", "Content-Length: abc"), (400,)),
    "H3 length 10^10": (post(TEXT, b"{}", "Content-Length: 10000000000"), (413,)),
    "H3 length twice": (post(TEXT, b"{}", "Content-Length: 2", "Content-Length: 3"), (400,)),
    "H4 chunked with a length": (
        post(TEXT, b"2\r\n{}\r\n0\r\n\r\n", "Content-Length: 2", "Transfer-Encoding: chunked"),
        (400,),
    ),
    "H5 60 MB": (post(TEXT, HUGE), (413,)),
    "H5 60 MB in chunks": (
        post(TEXT, b"%x\r\n%s\r\n0\r\n\r\n" % (len(HUGE), HUGE), "Transfer-Encoding: chunked"),
        (413,),
    ),
    "H6 nested 200,000 deep": (post(TEXT, DEEP), (400,)),
    "H7 5,000 digits": (post(TEXT, _number("9" * 5000)), (400,)),
    "H8 no UTF-8": (post(TEXT, b'{"model": "tiny", "prompt": "\xff\xfe"}'), (400,)),
    "H8 lone surrogate": (post(TEXT, rb'{"model": "tiny", "prompt": "\ud800"}'), (400,)),
    "H9 NaN": (post(TEXT, b'{"model": "tiny", "prompt": "x", "temperature": NaN}'), (400,)),
    "H9 infinity": (post(TEXT, b'{"model": "tiny", "prompt": "x", "top_p": 1e999}'), (400,)),
    "H9 negative max_tokens": (post(TEXT, completion(max_tokens=-1)), (400,)),
    "H9 max_tokens as text": (post(TEXT, completion(max_tokens="5")), (400,)),
    "H9 penalty of nothing": (post(TEXT, completion(repetition_penalty=1e-176)), (400,)),
    "H9 key twice": (post(TEXT, b'{"model": "tiny", "prompt": "x", "prompt": "y"}'), (400,)),
    "H10 n": (post(TEXT, completion(n=10**6)), (400,)),
    "H11 stops": (post(TEXT, completion(stop=["x"] * 10**5)), (400,)),
    "H11 long stop": (post(TEXT, completion(stop="x" * 257)), (400,)),
    "H13 evil host": (post(TEXT, completion(), host="evil.example"), (403,)),
    "H13 evil origin": (post(TEXT, completion(), "Origin: https://evil.example"), (403,)),
    "H13 plain text": (
        post(TEXT, completion()).replace(b"application/json", b"text/plain"), (415,),
    ),
    "H14 model is a path": (post(TEXT, completion(model="/etc")), (404,)),
    "H14 model is an address": (post(TEXT, completion(model="https://evil.example/x")), (404,)),
    "H14 id beyond the vocabulary": (post(TEXT, completion(prompt=[5, 300])), (400,)),
    "H14 id of 2^63": (post(TEXT, completion(prompt=[2**63])), (400,)),
    "H14 negative id": (post(TEXT, completion(prompt=[-1])), (400,)),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (400, 0)),
    "long headers": (post(TEXT, b"{}", "X: " + "y" * 20_000), (400,)),
    "many headers": (post(TEXT, b"{}", *(f"X{i}: {'y' * 80}" for i in range(500))), (400,)),
    "two hosts": (post(TEXT, completion(), "Host: evil.example"), (400,)),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(serving: Callable[..., Any]) -> Any:
    return serving("torch")


@pytest.fixture(scope="module")
def unharmed(server: Any) -> Iterator[Callable[[], None]]:
    """Asserts that the engine says what it said before, without having been restarted."""
    text, restarts = server.greedy(), server.metric("solollm_engine_restarts")

    def check() -> None:
        assert server.greedy() == text
        assert server.metric("solollm_engine_restarts") == restarts

    yield check
    check()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_with_a_reason(
    name: str, server: Any, unharmed: Callable[[], None]
) -> None:
    """A worker that dies of a request, a thread that waits for ever, a reason that is not given."""
    request, allowed = HOSTILE[name]
    answer = server.exchange(request)
    assert status(answer) in allowed, answer[:300]
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"application/json" in head:
        assert json.loads(body)["error"]["message"]
    unharmed()


def test_half_open_connections_block_nobody(server: Any, unharmed: Callable[[], None]) -> None:
    """H12: 300 clients that begin a request and say no more."""
    with contextlib.ExitStack() as stack:
        for place in range(300):
            sock: socket.socket = stack.enter_context(server.connect())
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"[: 10 + place % 50])
        unharmed()


def test_the_field_of_a_message_is_named(server: Any) -> None:
    """An error that blames the wrong field, or none."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}, {"role": "nobody"}]}
    answer = server.exchange(post(CHAT, json.dumps(body).encode()))
    assert b"messages.1" in answer


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20) | st.sampled_from(["", "\0", "\ud800", "tiny", "<|end|>", "ﷺ" * 50]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


def from_schema(schema: dict[str, Any], root: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that fit a JSON schema; now and then, at any depth, one that need not."""
    if "$ref" in schema:
        return from_schema(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return st.one_of([from_schema(option, root) for option in schema[key]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    fitting = _typed(schema, root)
    return st.integers(0, 300).flatmap(lambda roll: JSON if roll == 0 else fitting)


def _typed(schema: dict[str, Any], root: dict[str, Any]) -> st.SearchStrategy[Any]:
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        needed = schema.get("required", [])
        fields = {n: from_schema(s, root) for n, s in schema["properties"].items()}
        return st.fixed_dictionaries(
            {n: f for n, f in fields.items() if n in needed},
            optional={n: f for n, f in fields.items() if n not in needed},
        )
    if kind == "object":
        inner = schema.get("additionalProperties")
        values = from_schema(inner, root) if isinstance(inner, dict) else JSON
        keys = st.text(max_size=6) | st.integers(0, 400).map(str)
        return st.dictionaries(keys, values, max_size=4)
    if kind == "array":
        return st.lists(from_schema(schema["items"], root), max_size=5)
    if kind == "integer":
        return st.integers(schema.get("minimum", -3), schema.get("maximum", 400))
    if kind == "number":
        low = schema.get("minimum", schema.get("exclusiveMinimum", -100))
        return st.floats(low, schema.get("maximum", 100), allow_nan=False)
    return {
        "string": st.text(max_size=30), "boolean": st.booleans(), "null": st.none(),
    }.get(str(kind), JSON)  # fmt: skip


def _bodies(model: type[ChatRequest] | type[CompletionRequest]) -> st.SearchStrategy[Any]:
    """Requests of an endpoint that mostly name the model, and ask for few tokens."""
    schema = model.model_json_schema(by_alias=True)

    def pinned(body: Any, tokens: Any, name: Any) -> Any:
        if isinstance(body, dict):
            body = {**body, "model": name, "max_tokens": tokens}
            body.pop("max_completion_tokens", None)
        return body

    tokens = st.sampled_from([1, 2, 3, 3, 8, 2**40, 0, None, "1", 1.5])
    names = st.sampled_from(["tiny"] * 12 + ["", "/etc/passwd", None, 5])
    return st.builds(pinned, from_schema(schema, schema), tokens, names)


def _fuzz(server: Any, examples: int, unharmed: Callable[[], None]) -> dict[int, int]:
    """Statuses and how often each came."""
    counts: dict[int, int] = {}
    cases = st.tuples(st.just(CHAT), _bodies(ChatRequest)) | st.tuples(
        st.just(TEXT), _bodies(CompletionRequest)
    )

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(cases)
    def send(case: tuple[str, Any]) -> None:
        path, body = case
        if isinstance(body, dict) and body.get("max_tokens") is None:
            body["max_tokens"] = 4
        content = json.dumps(body).encode()
        code = status(server.exchange(post(path, content)))
        counts[code] = counts.get(code, 0) + 1
        assert code in (200, 400, 404, 413), content
        if sum(counts.values()) % 50 == 0:
            unharmed()

    send()
    return counts


def _bytes_held() -> tuple[int, int]:
    """Resident bytes of this process, which is the server's and makes the requests too, and of the
    workers."""
    process = psutil.Process()
    workers = sum(p.memory_info().rss for p in process.children(recursive=True))
    return process.memory_info().rss, workers


def test_fuzzed_requests_are_answered_or_refused(server: Any, unharmed: Callable[[], None]) -> None:
    """A combination of fields that nobody thought of, and that ends in a 500 or a dead worker."""
    counts = _fuzz(server, 100, unharmed)
    print(counts)
    assert counts[200] > 3


class _Bystander(threading.Thread):
    """A client that asks the same thing all the while, and waits no longer than its time limit."""

    def __init__(self, server: Any, text: str) -> None:
        super().__init__()
        self._server = server
        self._text = text
        self._is_over = threading.Event()
        self.waits: list[float] = []
        self.harm: str = ""

    def run(self) -> None:
        while not self._is_over.is_set() and not self.harm:
            begun = time.monotonic()
            try:
                told = self._server.greedy()
            except httpx.HTTPError as error:
                self.harm = f"{type(error).__name__} after {len(self.waits)} answers"
                return
            self.waits.append(time.monotonic() - begun)
            self.harm = "" if told == self._text else f"another answer: {told!r}"

    def end(self) -> None:
        self._is_over.set()
        self.join()
        assert not self.harm


@pytest.mark.slow
def test_2000_fuzzed_requests_leave_memory_as_it_was(
    server: Any, unharmed: Callable[[], None]
) -> None:
    """The same at length, beside a client that must not notice, with an eye on what is kept."""
    _fuzz(server, 300, unharmed)
    bystander = _Bystander(server, server.greedy())
    before = _bytes_held()
    bystander.start()
    try:
        counts = _fuzz(server, 2000, unharmed)
    finally:
        bystander.end()
    grown = [after - held for after, held in zip(_bytes_held(), before, strict=True)]
    print(counts, *(f"{b / 1e6:.1f} MB {g / 1e6:+.1f}" for b, g in zip(before, grown, strict=True)))
    median, longest = statistics.median(bystander.waits), max(bystander.waits)
    print(f"{len(bystander.waits)} answers beside: {median:.2f} s, at most {longest:.2f} s")
    assert sum(counts.values()) >= 2000
    assert counts[200] > 100
    assert sum(grown) < 100e6
