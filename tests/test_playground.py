"""The playground in Chromium, over a server with two bundles of tiny-r1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import browser, page_in
from tests.exports import Exports
from tests.served import Served, one_thread, served


@pytest.fixture(scope="module")
def server(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("playground")
    bundles = [one_thread(exports.copy(folder / name, "cpu")) for name in ("first", "second")]
    (bundles[0] / "report.html").write_text("<title>A report</title>", encoding="utf-8")
    (bundles[1] / "report.html").unlink(missing_ok=True)
    with served(*bundles) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture
def page(server: Served, chromium: Browser) -> Iterator[Page]:
    with page_in(chromium, server.url) as page:
        expect(page.get_by_label("Bundle")).to_be_visible()
        yield page


def _ask(page: Page, question: str) -> None:
    page.get_by_label("Your message").fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=20_000)


def test_a_question_is_answered_with_the_thought_folded(page: Page) -> None:
    _ask(page, "Add 4 and 5.")
    answer = page.locator("li.assistant")
    expect(answer.locator(".answer")).to_have_text("9")
    expect(answer).to_contain_text(re.compile(r"\d+ tokens, [\d.]+ tokens/s"))
    thought = answer.locator(".thought div")
    expect(thought).to_be_hidden()
    answer.get_by_text("Thought").click()
    expect(thought).to_contain_text("4 + 5")


def test_retry_and_edit_begin_at_their_turn(page: Page) -> None:
    for question in ("Add 4 and 5.", "Add 1 and 1."):
        _ask(page, question)
        expect(page.get_by_role("button", name=f"Edit: {question}")).to_be_visible()
    expect(page.locator("li")).to_have_count(4)
    page.get_by_role("button", name="Retry").first.click()
    expect(page.locator("li")).to_have_count(2)
    expect(page.get_by_role("status")).to_have_text("Done.")
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("li")).to_have_count(0)
    expect(page.get_by_label("Your message")).to_have_value("Add 4 and 5.")


def test_two_bundles_answer_one_question_side_by_side(page: Page) -> None:
    page.get_by_role("button", name="Two side by side").click()
    expect(page.get_by_label("Bundle").last).to_have_value("second")
    _ask(page, "Add 4 and 5.")
    expect(page.locator(".answer")).to_have_text(["9", "9"])
    expect(page.get_by_role("link", name="Report").first).to_have_attribute("href", "/reports/first")
    expect(page.locator(".report").last).to_be_hidden()
    page.set_viewport_size({"width": 360, "height": 720})
    below = page.locator("#ask").bounding_box()
    for column in page.locator(".column").all():
        box = column.bounding_box()
        assert box and below and box["height"] > 100 and box["y"] + box["height"] <= below["y"]


def test_what_is_set_is_asked_for_and_counts(page: Page) -> None:
    page.get_by_text("Sampling").click()
    page.get_by_label("Most tokens").fill("5")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("System prompt").fill("Be brief.")
    with page.expect_request("**/v1/chat/completions") as sent:
        _ask(page, "Add 4 and 5.")
    asked: dict[str, Any] = sent.value.post_data_json or {}
    assert {name: asked[name] for name in ("max_tokens", "temperature", "seed")} == {
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 7,
    }
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."} and "top_p" not in asked
    expect(page.locator("li.assistant")).to_contain_text("5 tokens,")
    expect(page.locator("li.assistant")).to_contain_text("cut after the 5 tokens that are set")


def test_an_answer_is_stopped_and_the_next_is_written(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that does not come
    page.get_by_label("Your message").fill("Add 4 and 5.")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("li.assistant")).to_contain_text("stopped")
    page.unroute("**/v1/chat/completions")
    _ask(page, "Add 1 and 1.")
    expect(page.locator(".answer").last).to_have_text("2")


def test_nothing_of_a_model_becomes_a_page(page: Page) -> None:
    hostile = (
        "<img src=/v1/models onerror=alert(1)><script>document.title='taken'</script><form action=/x><input></form>"
        "<b onclick=alert(1) id=send>bold</b> <a href='javascript:alert(1)'>x</a> "
        "$\\href{javascript:alert(1)}{y}$"
    )
    _ask(page, "Add 4 and 5.")
    html = page.evaluate(
        "text => { const e = document.querySelector('.answer'); showText(e, text); return e.innerHTML }", hostile
    )
    assert not re.search(r"<(img|script|form|input)|onerror=|onclick=|href=.javascript|id=.send", html)
    assert "<b>bold</b>" in html and page.title() == "Playground"


def test_markdown_and_formulas_are_drawn(page: Page) -> None:
    text = "So **that** is $x^2$, \\(y\\) and \\boxed{\\frac{1}{2}}; it costs $5 or $6.\n\n\\[\\sum_k k\\]"
    text += "\n\n| a |\n|---|\n| 1 |"
    _ask(page, "Add 4 and 5.")
    page.evaluate("text => showText(document.querySelector('.answer'), text)", text)
    expect(page.locator(".answer .katex-html")).to_have_count(4)
    expect(page.locator(".answer .katex-error")).to_have_count(0)
    expect(page.locator(".answer")).to_contain_text("it costs $5 or $6.")
    expect(page.locator(".answer strong")).to_have_text("that")
    expect(page.locator(".answer td")).to_have_text("1")


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_and_a_dark_page_keep_everything_in_sight(page: Page, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 640})
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    _ask(page, "Add 4 and 5.")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport()


def test_everything_the_page_loads_comes_from_the_server_under_a_strict_policy(server: Served) -> None:
    static = Path(__file__).resolve().parent.parent / "toolkit" / "serve" / "static"
    for path in (static / "index.html", static / "playground.css", static / "playground.js", static / "text.js"):
        assert not re.search(r"(?:src|href|url\(|fetch\()\W*https?:", path.read_text(encoding="utf-8"))
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    report = httpx.get(f"{server.url}/reports/first")
    assert report.headers["content-security-policy"].startswith("sandbox") and "A report" in report.text
    assert httpx.get(f"{server.url}/reports/second").status_code == 404
    assert httpx.get(f"{server.url}/reports/..%2Ffirst").status_code == 404
