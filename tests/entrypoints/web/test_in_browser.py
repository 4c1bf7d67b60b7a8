"""The page in a real browser, with real traffic: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from server_process import ServerProcess

playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]

SYSTEM = "You are a librarian. Answer in one sentence. " + "Every book has a place on a shelf. " * 20
TOOL = '[{"type": "function", "function": {"name": "find_book", "parameters": {"type": "object", "properties": {}}}}]'
ADMIN_KEY = "operator"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def served(server_factory) -> ServerProcess:
    size = ("--max-model-len", "2048", "--num-gpu-blocks-override", "1024")
    served = server_factory(*size, "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    for question in ("What is a colophon?", "What is a folio?", "What is a quire?"):
        chat(served.url, SYSTEM, question)
    for day in ("8", "9", "10"):
        chat(served.url, f"You sail a ship. Today is day {day} of the month. " + "The wind blows. " * 20, "Hello")
    return served


def chat(url: str, system: str, question: str) -> None:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    httpx.post(
        f"{url}/v1/chat/completions", json={"messages": messages, "max_tokens": 8}, timeout=120
    ).raise_for_status()


class Visit:
    """A page, and what went wrong on it."""

    def __init__(self, browser, url: str, **options) -> None:
        self.url = url.replace("127.0.0.1", "localhost")
        self.troubles: list[str] = []
        self.context = browser.new_context(**{"locale": "en-US", **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", self._on_request)

    def _on_console(self, message) -> None:
        if message.type in ("error", "warning"):
            self.troubles.append(message.text)

    def _on_request(self, request) -> None:
        if urlsplit(request.url).netloc != urlsplit(self.url).netloc:
            self.troubles.append(f"asked {request.url}")

    def go(self, view: str):
        self.page.goto(f"{self.url}/#{view}")
        return self.page

    def end(self) -> None:
        wide = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        self.context.close()
        assert not self.troubles and wide <= 0


@pytest.fixture
def visit(browser, served) -> Iterator[Visit]:
    visit = Visit(browser, served.url)
    yield visit
    visit.end()


def test_the_pool_shows_what_it_saves_and_is_steered(visit):
    page = visit.go("pool")
    page.get_by_text("tokens were read instead of computed").wait_for()
    assert page.locator(".extent").count() >= 2
    assert "KV memory of 16,384 tokens" in page.locator(".map").get_attribute("aria-label")
    assert {"8", "9"} <= set(page.locator(".examples mark").all_inner_texts())

    page.get_by_role("button", name="Pin a prompt").click()
    page.get_by_label("System prompt").fill("You are a sailor <b>of the north</b>.")
    page.get_by_label("Name").fill("<i>sailor</i>")
    page.get_by_role("button", name="Pin", exact=True).click()
    row = page.get_by_role("row", name="<i>sailor</i>")
    row.get_by_role("button", name="Edit").click()
    page.get_by_label("Name").fill("captain")
    page.get_by_label("Seconds unused").fill("3600")
    page.get_by_role("button", name="Save").click()
    row = page.get_by_role("row", name="captain")
    assert "min" in row.locator("td[data-label=Expires]").inner_text()
    row.get_by_role("button", name="Unpin").click()
    page.locator("dialog").get_by_role("button", name="Unpin").click()
    row.wait_for(state="detached")


def test_now_draws_the_last_hour(visit):
    page = visit.go("now")
    page.locator(".plot canvas").first.wait_for()
    assert page.locator(".plot canvas").count() == 4
    assert "generated:" in page.locator(".plot").first.get_attribute("aria-label")


def test_a_chat_streams_and_says_what_was_cached_and_stops(visit):
    page = visit.go("chat")
    page.get_by_label("System prompt").fill(SYSTEM)
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Message").fill("What is a colophon?")
    page.keyboard.press("Enter")
    page.locator(".measured").first.wait_for()
    said = page.locator(".measured").first.inner_text()
    cached, prompt = (int(said.split()[i].replace(",", "")) for i in (0, 2))
    assert 100 < cached < prompt
    page.get_by_label("Most tokens").fill("1500")
    page.get_by_label("Message").fill("Count to one thousand.")
    page.keyboard.press("Enter")
    page.locator(".turn.assistant").nth(1).locator(".text:not(:empty)").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    page.get_by_label("Tools").fill(TOOL[1:])
    page.get_by_label("Message").fill("Find it")
    page.keyboard.press("Enter")
    page.get_by_text("The tools are not a JSON list").wait_for()
    page.get_by_label("Tools").fill(TOOL)
    page.get_by_role("button", name="Explain this chat").click()
    page.locator("form").get_by_role("button", name="Explain").click()
    assert "Find it" in page.locator(".rendered").inner_text()
    assert "find_book" in page.locator("#body").input_value()


def test_explain_draws_the_boundary_and_the_first_token_that_differs(visit):
    page = visit.go("explain")
    page.locator("#body").fill(
        '{"messages": [{"role": "system", "content": "You are a librarian. Answer in two."}, '
        '{"role": "user", "content": "Hello"}]}'
    )
    page.locator("form").get_by_role("button", name="Explain").click()
    page.locator(".boundary").wait_for()
    assert page.locator(".chip.large").inner_text() == "Miss"
    assert "You are a librarian" in page.locator(".rendered .system").inner_text()
    assert "Hello" not in page.locator(".rendered .system").inner_text()
    assert page.locator(".tokens mark").all_inner_texts() == ['" one"', '" two"']
    page.locator("#body").fill("{")
    page.locator("form").get_by_role("button", name="Explain").click()
    page.get_by_text("This is not JSON").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone_speaks_chinese_and_axe_finds_nothing(browser, served, tmp_path_factory, theme):
    axe = fetch_axe(tmp_path_factory.mktemp("axe"))
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
    visit = Visit(browser, served.url, locale="zh-CN", color_scheme=theme, bypass_csp=True, **phone)
    for view, sign in (("pool", ".legend"), ("now", ".plot canvas"), ("chat", ".log"), ("explain", "#body")):
        page = visit.go(view)
        page.locator(sign).first.wait_for()
        if view == "explain":
            page.locator("form .primary").click()
            page.locator(".rendered").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, view
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        if axe is not None:
            page.evaluate(axe)
            found = page.evaluate("axe.run()")["violations"]
            assert [
                (one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")
            ] == []
    visit.end()


def fetch_axe(folder: Path) -> str | None:
    """The script of axe-core; None where npm cannot fetch it."""
    npm = shutil.which("npm")
    command = [npm, "install", "--silent", "--prefix", str(folder), "axe-core@4"]
    if npm is None or subprocess.run(command, capture_output=True, timeout=120).returncode:
        return None
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


def test_views_are_reached_by_keyboard(visit):
    page = visit.go("pool")
    page.locator(".legend").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator(".plot").first.wait_for()
    assert page.evaluate("document.activeElement.id") == "main"


def test_keys_are_asked_for_and_stay_in_the_tab(browser, server_factory):
    served = server_factory(
        "--max-model-len", "512", "--num-gpu-blocks-override", "64", "--api-key", "user", "--admin-api-key", ADMIN_KEY,
        api_key="user",
    )  # fmt: skip
    visit = Visit(browser, served.url)
    page = visit.go("pool")
    page.get_by_text("The operator's key").wait_for()
    page.locator("#key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("does not take the key").wait_for()
    page.locator("#key").fill(ADMIN_KEY)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Pin a prompt").wait_for()
    kept = page.evaluate("[JSON.stringify({...localStorage}), JSON.stringify({...sessionStorage}), document.cookie]")
    assert ADMIN_KEY not in kept[0] and ADMIN_KEY in kept[1] and kept[2] == ""
    # The browser itself notes each 401 on the console; nothing else may be there.
    visit.troubles = [text for text in visit.troubles if "401" not in text]
    visit.end()
    served.stop()
