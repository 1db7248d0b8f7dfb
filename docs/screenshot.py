"""Takes docs/playground.png, the picture in README.md, of the playground over a bundle: `python docs/screenshot.py
[BUNDLE]`, tiny-r1 in build/ if none is named. It needs Chromium and the extra `test`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PICTURE: Final = ROOT / "docs" / "playground.png"
QUESTION: Final = "Add 47 and 38."


def take(bundle: Path) -> None:
    """Asks a question in the playground, unfolds its thought, and keeps what is seen."""
    from playwright.sync_api import expect

    from tests.browser import opened
    from tests.served import served

    with served(bundle) as server, opened(server.url) as page:
        page.set_viewport_size({"width": 900, "height": 520})
        page.get_by_label("Your message").fill(QUESTION)
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Done.", timeout=60_000)
        page.get_by_text("Thought").click()
        page.get_by_label("Your message").fill("Spell the word river backwards.")
        page.screenshot(path=PICTURE)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    take(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "tiny-r1-cpu")
