"""The page of docs/examples/browser/ over a bundle, in the system's Chromium, with its libraries in build/."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from playwright.sync_api import Page, expect

from tests.browser import opened
from tests.npm import npm_or_skip
from toolkit.evaluate.session import continuations
from toolkit.evaluate.text_model import TextModel

ROOT: Final = Path(__file__).resolve().parent.parent
EXAMPLE: Final = ROOT / "docs" / "examples" / "browser"
MOST: Final = 300
_A_MINUTE: Final = 60_000


def page_folder() -> Path:
    """The page with its libraries, in a folder of its own; they are installed once and kept."""
    npm, folder = npm_or_skip(), ROOT / "build" / "browser-page"
    wanted, installed = (EXAMPLE / "package.json").read_text(encoding="utf-8"), folder / "installed"
    leave_out = shutil.ignore_patterns("node_modules", "package-lock.json", "__pycache__")
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=leave_out)
    if not installed.is_file() or installed.read_text(encoding="utf-8") != wanted:
        subprocess.run([npm, "install", "--no-audit", "--no-fund", "--silent"], check=True, cwd=folder)
        installed.write_text(wanted, encoding="utf-8")
    return folder


@contextmanager
def page_over(
    folder: Path, bundle: Path, *arguments: str, host: str = "127.0.0.1", query: str = "", is_fine: bool = True
) -> Iterator[Page]:
    """The page as serve.py serves it, once it rests: it has opened the bundle, or said why not."""
    words = [sys.executable, "serve.py", str(bundle), "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, encoding="utf-8", cwd=folder)
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip().rstrip("/").rpartition(":")[2]
        with opened(f"http://{host}:{port}/{query}", *arguments, is_fine=is_fine) as page:
            expect(page.get_by_role("status")).to_have_text(re.compile(r"Ready\.|Error: "), timeout=_A_MINUTE)
            yield page
    finally:
        server.terminate()
        server.wait(20)


def asked(page: Page, question: str, most: int = MOST) -> tuple[list[int], str, str]:
    """The ids and the text that the page writes, and what it says in the end."""
    page.get_by_label("Most tokens").fill(str(most))
    page.get_by_label("Your message").fill(question)
    page.keyboard.press("Enter")
    status = page.get_by_role("status")
    expect(status).to_have_text(re.compile(r"tokens read|Error: "), timeout=2 * _A_MINUTE)
    answer = page.locator("li.assistant").last
    ids = (answer.get_attribute("data-ids") or "").split()
    return [int(word) for word in ids], answer.text_content() or "", status.text_content() or ""


def genais(bundle: Path, questions: list[str], most: int = MOST) -> list[list[int]]:
    """onnxruntime-genai's likeliest tokens after each question, asked by itself."""
    model = TextModel(bundle, on_cpu=True)
    prompts = [model.template.render([{"role": "user", "content": question}]) for question in questions]
    ids = [[int(token) for token in model.template.tokenizer.encode(prompt)] for prompt in prompts]
    return continuations(bundle, ids, most, on_cpu=True)
