"""The chat page in a real browser (headless Chromium), against the real front."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from solollm.serving.chat_page import chat_page
from solollm.testing.scripted_server import ScriptedServer, ScriptedTokenEngine
from solollm.tokenizer import Tokenizer

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
KEY = "page-key-" + "k" * 30
HOSTILE = """\
<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>
[click](javascript:window.hacked=1) ![x](https://elsewhere.example/x.png)

# <b onclick=hacked>Title</b>

```html
</code></pre><script>window.hacked=1</script>
```
<style>body{display:none}</style> `<iframe src="https://elsewhere.example">`"""
RICH = """\
## A heading

Some **strong**, *slanted* and `code` words, snake_case_words, a [link](https://example.org/a_(b)).

1. first
2. second
   - nested

| name | value |
|:--|--:|
| a | 1 |

> quoted

```python
def greet(name):  # a comment
    return f"hello {name}" * 2
```
"""


def reply_to(prompt: str) -> str:
    """By the last thing that was said."""
    said = prompt.rpartition("<|user|>")[2]
    for word, answer in (("hostile", HOSTILE), ("rich", RICH), ("count", "one two " * 200)):
        if word in said:
            return answer
    return f"You said: {said.partition('<|')[0]}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield found
        found.close()


class Opened:
    """A page at a server, and what went wrong in it or left the machine."""

    def __init__(self, browser: Any, server: ScriptedServer, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda m: m.type == "error" and self.problems.append(m.text))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.set_default_timeout(20_000)
        self.page.goto(server.url)
        self.page.wait_for_selector("#panes > *")

    def ask(self, text: str) -> Any:
        """Type, press Enter, wait for the answer's end; the answer."""
        self.page.locator("#input").fill(text)
        self.page.keyboard.press("Enter")
        return self.finished()

    def finished(self) -> Any:
        self.page.wait_for_selector("#send:not([hidden])")
        return self.page.locator(".assistant").last


@pytest.fixture
def open_page(
    browser: Any, served_tokenizer: Tokenizer
) -> Iterator[Callable[..., tuple[Opened, dict[str, ScriptedTokenEngine]]]]:
    """Opens the page at a new server; `pause`: seconds per token."""
    opened: list[tuple[Opened, ScriptedServer]] = []

    def start(
        names: tuple[str, ...] = ("late",), *, pause: float = 0.0, key: str = "",
        chat: tuple[str, ...] | None = None, **context: Any,
    ) -> tuple[Opened, dict[str, ScriptedTokenEngine]]:  # fmt: skip
        engines = {
            name: ScriptedTokenEngine(served_tokenizer, lambda p, _: reply_to(p), pause)
            for name in names
        }
        server = ScriptedServer(engines, chat=chat, key=key)
        try:
            page = Opened(browser, server, **context)
        except BaseException:
            server.close()
            raise
        opened.append((page, server))
        return page, engines

    yield start
    for page, server in opened:
        page.context.close()
        server.close()
        assert page.problems == []
        assert all(url.startswith((server.url, "data:")) for url in page.requests)


def test_a_question_is_answered_with_its_speed(open_page: Callable[..., Any]) -> None:
    """Nothing comes, the text comes doubled, or the prompt is not what was typed."""
    opened, engines = open_page()
    answer = opened.ask("good morning")
    assert answer.locator(".text").inner_text() == "You said: good morning"
    assert re.search(r"[\d.]+ tokens/s · \d+ tokens · first after", answer.inner_text())
    opened.ask("and again")
    assert re.findall(r"<\|(\w+)\|>([^<]*)", engines["late"].prompts[-1]) == [
        ("bos", ""), ("user", "good morning"), ("end", ""),
        ("assistant", "You said: good morning"), ("end", ""),
        ("user", "and again"), ("end", ""), ("assistant", ""),
    ]  # fmt: skip


def test_markdown_becomes_structure(open_page: Callable[..., Any]) -> None:
    """Lists, tables or code shown as raw characters; underscores in names read as emphasis."""
    opened, _ = open_page()
    text = opened.ask("something rich").locator(".text")
    assert text.locator("h2").inner_text() == "A heading"
    assert text.locator("p strong").inner_text() == "strong"
    assert text.locator("p em").inner_text() == "slanted"
    assert "snake_case_words" in text.locator("p").first.inner_text()
    assert text.locator("a").get_attribute("href") == "https://example.org/a_(b)"
    assert text.locator("ol > li").count() == 2
    assert text.locator("ol ul > li").inner_text() == "nested"
    assert text.locator("td.right").inner_text() == "1"
    assert text.locator("blockquote").inner_text() == "quoted"
    code = text.locator("pre code")
    assert code.inner_text().startswith("def greet(name):  # a comment\n    return")
    assert code.locator(".k").all_inner_texts() == ["def", "return"]
    assert code.locator(".c").inner_text() == "# a comment"


def test_a_hostile_answer_stays_text(open_page: Callable[..., Any]) -> None:
    """A model that writes markup or script into the page of its reader."""
    opened, _ = open_page()
    text = opened.ask("be hostile").locator(".text")
    assert "<script>window.hacked=1</script>" in text.inner_text()
    assert "[click](javascript:window.hacked=1)" in text.inner_text()
    assert opened.page.evaluate("window.hacked") is None
    assert text.locator("img, script, style, iframe, a[href^='javascript']").count() == 0
    assert text.locator("pre code").inner_text() == "</code></pre><script>window.hacked=1</script>"
    assert opened.page.locator("#composer").is_visible()


def test_escape_stops_and_the_server_hears_of_it(open_page: Callable[..., Any]) -> None:
    """An answer that goes on unseen, and holds the model, after its reader stopped it."""
    opened, engines = open_page(pause=0.02)
    opened.page.locator("#input").fill("count for me")
    opened.page.keyboard.press("Enter")
    opened.page.get_by_text("one two").wait_for()
    opened.page.keyboard.press("Escape")
    answer = opened.finished()
    assert "stopped" in answer.locator(".figures").inner_text()
    assert 0 < len(answer.locator(".text").inner_text()) < 1500
    deadline = time.monotonic() + 20
    while not engines["late"].num_cancelled and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engines["late"].num_cancelled == 1


def test_regenerate_and_edit(open_page: Callable[..., Any]) -> None:
    """A second answer under the first, or turns left behind that the edited question never had."""
    opened, engines = open_page()
    opened.ask("first")
    opened.ask("second")
    opened.page.locator(".assistant").last.get_by_role("button", name="Regenerate").click()
    assert opened.finished().locator(".text").inner_text() == "You said: second"
    assert opened.page.locator(".message").count() == 4
    assert engines["late"].jobs[-1].prompt_ids == engines["late"].jobs[-2].prompt_ids

    opened.page.locator(".user").first.get_by_role("button", name="Edit").click()
    box = opened.page.get_by_role("textbox", name="Edit the message")
    assert box.input_value() == "first"
    box.press("Escape")
    assert opened.page.locator(".message").count() == 4
    opened.page.locator(".user").first.get_by_role("button", name="Edit").click()
    box.fill("changed")
    box.press("Enter")
    assert opened.finished().locator(".text").inner_text() == "You said: changed"
    assert opened.page.locator(".message").count() == 2


def test_settings_reach_the_model_and_last(open_page: Callable[..., Any]) -> None:
    """Sliders that change nothing; settings lost with a reload."""
    opened, engines = open_page()
    page = opened.page
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Top p").fill("0.5")
    page.get_by_label("Top k").fill("7")
    page.get_by_label("Seed").fill("11")
    page.get_by_label("New tokens at most").fill("5")
    page.reload()
    answer = opened.ask("good morning to you")
    job = engines["late"].jobs[-1]
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (
        0.25,
        0.5,
        7,
        11,
    )
    assert job.max_new_tokens == 5
    assert "Be brief." in engines["late"].prompts[-1]
    assert "5 tokens" in answer.locator(".figures").inner_text()


def test_two_models_answer_side_by_side(open_page: Callable[..., Any]) -> None:
    """One model's answer in the other's pane, or one of them never asked."""
    opened, engines = open_page(("early", "late"), chat=("late",))
    opened.page.get_by_role("button", name="Compare").click()
    first, second = opened.page.locator(".pane").all()
    second.get_by_label("Model").select_option("late")
    opened.ask("hello")
    assert first.locator(".assistant").count() == second.locator(".assistant").count() == 1
    # The base model goes on with the text itself, without a template.
    assert engines["early"].prompts == ["<|bos|>hello"]
    assert engines["late"].prompts[0].endswith("<|end|><|assistant|>")
    assert second.locator(".text").last.inner_text() == "You said: hello"
    opened.page.get_by_role("button", name="Compare").click()
    assert opened.page.locator(".pane").count() == 1


def test_the_keyboard_alone_is_enough(open_page: Callable[..., Any]) -> None:
    """A control that Tab never reaches; Shift+Enter that sends; two lines that arrive as one."""
    opened, engines = open_page()
    page = opened.page
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    opened.finished()
    assert "one\ntwo" in engines["late"].prompts[0]
    page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(20):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("(n => n.id || n.className || n.textContent)(document.activeElement)")
        )
    wanted = [
        "skip",
        "new",
        "compare",
        "settings-button",
        "model",
        "log",
        "copy",
        "edit",
        "input",
        "send",
    ]
    seen = seen[seen.index("skip") :]  # Tab went on from where the focus was, through the browser
    places = [seen.index(name) for name in wanted]
    assert places == sorted(places), seen
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input, textarea')]"
        ".filter(n => !n.textContent.trim() && !n.ariaLabel && !n.labels?.length)"
        ".map(n => n.outerHTML)"
    )
    assert unnamed == []


def test_with_a_key_the_browser_asks_for_it(open_page: Callable[..., Any]) -> None:
    """A page that nobody can use on a server with a key, or everybody without one."""
    credentials = {"username": "me", "password": KEY}
    opened, _ = open_page(key=KEY, http_credentials=credentials)
    assert opened.ask("hello").locator(".text").inner_text() == "You said: hello"
    base = opened.page.url
    assert httpx.get(base).status_code == 401
    assert httpx.get(base, auth=("me", KEY)).status_code == 200
    opened.problems = [p for p in opened.problems if "401" not in p]  # before the browser knew it


def test_an_engine_that_is_down_is_told_and_asked_again(open_page: Callable[..., Any]) -> None:
    """An error that looks like an empty answer, or after which nothing can be asked."""
    opened, engines = open_page()
    engines["late"].state_now = "down"
    answer = opened.ask("hello")
    assert "the engine is down" in answer.get_by_role("alert").inner_text()
    engines["late"].state_now = "ready"
    answer.get_by_role("button", name="Regenerate").click()
    assert opened.finished().locator(".text").inner_text() == "You said: hello"
    opened.problems = [p for p in opened.problems if "503" not in p]  # the browser logs it


@pytest.mark.parametrize("typed_on", ["", " world"])
def test_a_question_before_the_models_are_known_is_sent_when_they_are(
    typed_on: str, open_page: Callable[..., Any]
) -> None:
    """Enter that does nothing, pressed by someone who types faster than a busy machine answers; or
    one that sends what is still being written."""
    opened, engines = open_page()
    held: list[Any] = []
    opened.page.route("**/v1/models", lambda route: held.append(route))
    with opened.page.expect_request("**/v1/models"):
        opened.page.reload()
    box = opened.page.locator("#input")
    box.press("Enter")  # of nothing: forgotten
    box.fill("hello")
    opened.page.keyboard.press("Enter")
    opened.page.keyboard.type(typed_on)
    assert box.input_value() == f"hello{typed_on}"
    held[0].continue_()
    opened.page.wait_for_selector("#panes > *")
    if typed_on:
        assert box.input_value() == "hello world"
        assert not engines["late"].prompts
        opened.page.keyboard.press("Enter")
    opened.page.wait_for_selector(".assistant:not([aria-busy])")
    assert opened.finished().locator(".text").inner_text() == f"You said: hello{typed_on}"


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_sticks_out(width: int, open_page: Callable[..., Any]) -> None:
    """A phone that has to be scrolled sideways, or a button outside of it."""
    opened, _ = open_page(viewport={"width": width, "height": 700})
    opened.ask("something rich")
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        "w => [...document.querySelectorAll('button, select, textarea, .message')]"
        ".map(n => n.getBoundingClientRect())"
        ".filter(r => r.width && (r.left < 0 || r.right > w)).length",
        width,
    )
    assert outside == 0
    page.get_by_role("button", name="Settings", exact=True).click()
    assert page.get_by_label("System prompt").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_label("System prompt").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme: str, open_page: Callable[..., Any]) -> None:
    """Grey on grey: contrast below 4.5 (WCAG 2.2, AA) of any text on its ground."""
    opened, _ = open_page(color_scheme=scheme)
    opened.ask("something rich")
    low = opened.page.evaluate(
        """() => {
        const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const ground = (node) => {
            for (; node; node = node.parentElement) {
                const found = rgb(getComputedStyle(node).backgroundColor);
                if (found.length < 4 || found[3] > 0.99) return found;
            }
            return [255, 255, 255];
        };
        const low = [];
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        for (let text; (text = walker.nextNode()); ) {
            const node = text.parentElement;
            if (!text.data.trim() || !node.checkVisibility()) continue;
            if (node.closest("script, style")) continue;
            const pair = [light(rgb(getComputedStyle(node).color)), light(ground(node))];
            const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            if (contrast < 4.5) low.push([text.data, contrast]);
        }
        return low;
        }"""
    )
    assert low == []


def test_the_page_is_one_document_that_loads_nothing() -> None:
    """A script from elsewhere, or a policy that lets one in."""
    page = chat_page()
    text = page.content.decode()
    assert "/*script*/" not in text
    assert "/*style*/" not in text
    assert "innerHTML" not in text
    assert re.findall(r"""(?:src|href|@import|url\()\s*=?\s*["']?(https?:|//)""", text) == []
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
