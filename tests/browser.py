"""The system's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in _BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def browser(*more: str) -> Iterator[Browser]:
    """The browser, with `more` arguments. Nothing in this thread has an event loop of its own meanwhile."""
    if BROWSER is None:
        pytest.skip(f"no browser of {', '.join(_BROWSERS)} is on the path")
    # A sandbox of its own is not to be had as root.
    arguments = [*more, *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield started
        started.close()


@contextmanager
def page_in(started: Browser, url: str, is_fine: bool = True) -> Iterator[Page]:
    """A page as it opens, without what others left in the browser; where all `is_fine`, whatever its console says of
    errors fails the test."""
    with started.new_context() as context:
        page, wrong = context.new_page(), list[str]()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda problem: wrong.append(str(problem)))
        page.goto(url)
        yield page
    assert wrong == [] or not is_fine


@contextmanager
def opened(url: str, *more: str, is_fine: bool = True) -> Iterator[Page]:
    """A page in a browser of its own, with `more` arguments."""
    with browser(*more) as started, page_in(started, url, is_fine) as page:
        yield page
