"""The story of the playground: search, get from a hub on loopback, convert, talk, in Chromium; what may not be got."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Page, expect

from tests.browser import opened
from tests.exports import Exports
from tests.loopback_hub import REPO, Hub, hub_environment, loopback_hub
from tests.random_models import make_checkpoint
from tests.served import Served, served
from toolkit.serve.looker import Looker
from toolkit.serve.shelf_process import shelf_events
from toolkit.serve.wanted import Look, ShelfJob, Wanted

QUESTION = "Add 4 and 5."
# The model itself, and the bundles that the server of these tests has.
MADE_OF_TINY_R1 = {"tiny-r1", "made-before", "served"}


@dataclass
class Fresh:
    """A machine without a bundle: its hub, its server, and the folder that the server was started in."""

    hub: Hub
    server: Served
    folder: Path


@pytest.fixture
def fresh(tiny_r1: Path, tmp_path: Path) -> Iterator[Fresh]:
    checkpoint, folder = tmp_path / "hub", tmp_path / "user"
    folder.mkdir()
    checkpoint.mkdir()
    for path in tiny_r1.iterdir():
        if path.suffix in (".json", ".safetensors"):
            shutil.copy(path, checkpoint)
    with loopback_hub(checkpoint) as hub:
        hub.broken = hub.mended = True
        with served(cwd=folder, environment=hub_environment(hub, tmp_path / "home")) as server:
            yield Fresh(hub, server, folder)


def test_search_get_convert_talk(fresh: Fresh) -> None:
    fresh.hub.gate.clear()
    with opened(fresh.server.url) as page:
        _find(page)
        page.get_by_role("button", name=f"Get {REPO}").click()
        getting = page.get_by_role("region", name="Getting a model")
        expect(getting).to_contain_text(re.compile(r"Downloading, [\d.]+ MiB of [\d.]+ MiB"), timeout=30_000)
        # The catalogue is looked at anew, and the card of the hub's checkpoint is there behind it.
        with page.expect_response("**/playground/catalogue"):
            getting.get_by_role("button", name="Cancel").click()
        expect(getting).to_contain_text("was cancelled")
        fresh.hub.gate.set()
        assert not (fresh.folder / "build" / "some-model-cpu").exists()
        page.get_by_role("button", name=f"Get {REPO}").click()
        expect(getting).to_contain_text("some-model-cpu is ready", timeout=60_000)
        expect(page.get_by_role("button", name="Talk to some-model-cpu")).to_be_visible(timeout=30_000)
        getting.get_by_role("button", name="Talk to it").click()
        expect(page.get_by_label("Bundle")).to_have_value("some-model-cpu")
        page.get_by_label("Your message").fill(QUESTION)
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Done.", timeout=20_000)
        expect(page.locator(".answer")).to_have_text("9")
        assert not re.search(r"/(work|tmp|home)/", page.content())


def _find(page: Page) -> None:
    """A hub id is typed into the search, and looked up there."""
    page.get_by_label("Search").fill(REPO)
    page.get_by_label("Quality").select_option("fast")
    page.get_by_label("Search").press("Enter")
    # Behind the look that began as the page was opened.
    expect(page.get_by_role("heading", name=REPO)).to_be_visible(timeout=90_000)
    facts = re.compile("MiB.*bits a weight.*tokens of context.*licence mit")
    expect(page.locator("#cards > li").first).to_contain_text(facts)


@pytest.fixture(scope="module")
def idle(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that is asked for what it may not do, in a folder with a bundle that it was not told of."""
    folder = tmp_path_factory.mktemp("idle")
    exports.copy(folder / "build" / "made-before", "cpu")
    exports.copy(folder / "someone" / "local", "cpu")
    with served(exports.copy(folder / "served", "cpu"), cwd=folder) as server:
        yield server


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "no 'model'"),
        ({"model": ""}, "no model of the catalogue"),
        ({"model": "/etc"}, "no model of the catalogue"),
        ({"model": "../build"}, "no model of the catalogue"),
        ({"model": "someone/local"}, "no model of the catalogue"),
        ({"model": "a/b/c"}, "no model of the catalogue"),
        ({"model": "a/" + "b" * 300}, "no model of the catalogue"),
        ({"model": "a/b:../c.gguf"}, "no model of the catalogue"),
        ({"model": "http://127.0.0.1/a"}, "no model of the catalogue"),
        ({"model": "tiny-r1", "target": "toaster"}, "no target"),
        ({"model": "tiny-r1", "quality": "perfect"}, "no quality"),
        ({"model": ["tiny-r1"]}, "model is"),
    ],
)
def test_only_names_and_hub_ids_are_got(idle: Served, body: dict[str, Any], said: str) -> None:
    with idle.client() as http:
        answer = http.post("/playground/get", json=body)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"]
        assert http.get("/playground/get").json() == {"getting": None}


@pytest.mark.parametrize("path", ["/playground/get", "/playground/cancel", "/playground/open"])
def test_other_sites_cannot_ask_for_a_model(idle: Served, path: str) -> None:
    asked = json.dumps({"model": "tiny-r1", "name": "made-before"})
    for headers, status in (
        ({"Origin": "https://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Content-Type": "text/plain"}, 415),
    ):
        with idle.client() as http:
            given = {"Content-Type": "application/json", **headers}
            assert http.post(path, content=asked, headers=given).status_code == status
    with idle.client() as http:
        assert http.get("/playground/get").json() == {"getting": None}


def test_a_bundle_that_lies_there_is_served_by_its_name_alone(idle: Served) -> None:
    with idle.client() as http:
        for name in ("none", "..", "../served", "someone/local", None):
            assert http.post("/playground/open", json={"name": name}).status_code == 404
        assert http.post("/playground/open", json={"name": "made-before"}).json() == {"name": "made-before"}
        assert [row["id"] for row in http.get("/v1/models").json()["data"]] == ["served", "made-before"]
        # It is in the catalogue with the others, and no row says where anything lies.
        answer = http.get("/playground/catalogue")
    bundles = [row["name"] for row in answer.json()["rows"] if row["facts"]["kind"] == "bundle"]
    assert sorted(bundles) == ["made-before", "served"]
    rows = {row["name"]: row["facts"] for row in answer.json()["rows"]}
    assert {"made-before", "served", "1.5b", "tiny-r1"} <= rows.keys()
    assert rows["made-before"]["model"] == "tiny-r1" and rows["made-before"]["bundle_bytes"] > 1 << 20
    assert not re.search(r"/(work|tmp|home)/|path", answer.text)


def test_who_looks_again_waits_for_no_plan(idle: Served) -> None:
    with idle.client() as http:
        first = http.get("/playground/catalogue").json()
        (looks,) = [one for one in psutil.Process(idle.process.pid).children() if "look_child" in str(one.cmdline())]
        before = sum(looks.cpu_times()[:2])
        assert http.get("/playground/catalogue").json()["rows"][0]["name"] == first["rows"][0]["name"]
        assert sum(looks.cpu_times()[:2]) - before < 1


def test_a_process_that_looked_and_ended_is_started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that answers once and ends, as one does that nobody asks for long."""
    once = 'import sys; sys.stdin.readline(); print(\'{"kind": "rows", "text": "[]"}\', flush=True)'
    monkeypatch.setattr("toolkit.serve.shelf_process.python_module", lambda _: [sys.executable, "-c", once])

    async def looks() -> list[str]:
        looker = Looker()
        looker.look_early(Look())
        found = [(await looker.look(Look())).kind for _ in range(3)]
        monkeypatch.setattr("toolkit.serve.shelf_process.python_module", lambda _: [sys.executable, "-c", ""])
        found += [(await looker.look(Look())).kind]
        await looker.close()
        return found

    assert asyncio.run(looks()) == ["rows", "rows", "rows", "failed"]


def test_what_is_not_there_is_one_line_without_a_place(fresh: Fresh) -> None:
    with fresh.server.client() as http:
        (fresh.hub.folder / "config.json").write_text('{"model_type": "unheard-of"}', encoding="utf-8")
        answer = http.get("/playground/catalogue", params={"hub": REPO})
        assert answer.status_code == 400 and "unheard-of" in answer.json()["error"]["message"]
        assert http.get("/playground/catalogue", params={"hub": "/etc"}).status_code == 400
        assert http.post("/playground/get", json={"model": REPO}).json()["getting"]["state"] == "getting"
        again = http.post("/playground/get", json={"model": REPO})
        assert again.status_code == 409 and "is being got" in again.json()["error"]["message"]
        end = time.monotonic() + 60
        while (getting := http.get("/playground/get").json()["getting"])["state"] == "getting":
            assert time.monotonic() < end
            time.sleep(0.1)
        assert getting["state"] == "failed" and "unheard-of" in getting["problem"]
        assert "\n" not in getting["problem"] and "/tmp" not in getting["problem"]
        asked = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert asked.status_code == 404


def test_a_server_for_others_gets_nothing_unless_it_is_told_to(idle: Served) -> None:
    bundle = Path(psutil.Process(idle.process.pid).cwd()) / "served"
    for words, status in ((["--allow-host", "desk.local"], 404), (["--allow-host", "desk.local", "--allow-get"], 200)):
        with served(bundle, *words) as server, server.client() as http:
            assert http.get("/playground/get").status_code == status
            assert http.get("/playground/bundles").json()["may_get"] is (status == 200)


def test_a_download_is_told_in_bytes_as_they_arrive(tmp_path: Path, tiny_r1: Path) -> None:
    folder, out = tmp_path / "hub", tmp_path / "build"
    # 41 MB: huggingface_hub writes what arrives in pieces of 10.
    make_checkpoint("Qwen2", {"vocab_size": 20000, "hidden_size": 256}, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_r1 / name, folder)
    size, told = (folder / "model.safetensors").stat().st_size, list[dict[str, Any]]()
    job = json.dumps({"get": {"model": REPO, "target": "cpu", "quality": "fast"}, "folder": str(out)})
    with loopback_hub(folder) as hub:
        hub.broken = hub.mended = True
        hub.gate.clear()
        command = [sys.executable, "-m", "toolkit.serve.shelf_child", job]
        environment = hub_environment(hub, tmp_path / "home")
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                told.append(json.loads(line))
                if told[-1]["text"] == "download" and 0 < told[-1]["done"] < size:
                    hub.gate.set()
    steps = [(event["text"], event["done"]) for event in told if event["kind"] == "step"]
    downloaded = [done for phase, done in steps if phase == "download"]
    assert downloaded == sorted(downloaded) and any(10 << 20 <= done < size for done in downloaded)
    assert "pack" in dict(steps) and told[-1] == {"kind": "made", "text": "some-model-cpu", "done": 0, "total": 0}
    assert (out / "some-model-cpu" / "manifest.json").is_file()


def test_a_process_that_is_left_ends(tmp_path: Path) -> None:
    async def left() -> None:
        before = psutil.Process().children()
        task = asyncio.create_task(anext(shelf_events(ShelfJob(Wanted("tiny-r1"), str(tmp_path)))))
        while not (children := [child for child in psutil.Process().children() if child not in before]):
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)

    asyncio.run(left())


def test_the_catalogue_is_found_by_keyboard_and_fits_narrow_and_dark_pages(idle: Served) -> None:
    with opened(idle.url) as page:
        page.get_by_role("button", name="Models").press("Enter")
        expect(page.get_by_label("Search")).to_be_focused()
        expect(page.get_by_role("button", name="Get tiny-r1")).to_be_visible(timeout=60_000)
        page.keyboard.type("TINY-R1 mit")
        expect(page.locator("#cards > li h2").first).to_be_visible()
        assert {text.split(" ")[0] for text in page.locator("#cards > li h2").all_inner_texts()} <= MADE_OF_TINY_R1
        for width, scheme in ((320, "dark"), (320, "light"), (1280, "dark")):
            page.set_viewport_size({"width": width, "height": 640})
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # What a screen reader says of each control: none is without a name, none has another's.
        names = [control for role in ("button", "combobox", "searchbox", "checkbox") for control in _names(page, role)]
        assert all(names) and len(names) >= 5
        assert len(_names(page, "button")) == len(set(_names(page, "button")))
        page.keyboard.press("Shift+Tab")
        expect(page.get_by_role("button", name="Back to talking")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_label("Your message")).to_be_focused()


def _names(page: Page, role: str) -> list[str]:
    """The accessible names of the controls of one role that are to be seen."""
    found = re.findall(rf'^\s*- {role}(?: "((?:[^"\\]|\\.)*)")?', page.locator("body").aria_snapshot(), re.MULTILINE)
    return [str(name) for name in found]
