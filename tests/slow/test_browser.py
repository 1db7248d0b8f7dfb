"""The page of docs/examples/browser/ over bundles, in the system's Chromium: what it writes is what onnxruntime-genai
does. Its libraries are installed into build/ first."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import onnx
import pytest
from playwright.sync_api import Page, expect

import toolkit
from tests.browser_page import EXAMPLE, MOST, asked, genais, page_folder, page_over
from tests.exports import Exports
from toolkit.evaluate.webgpu import _in_float32

QUESTIONS: Final = ("Add 4 and 5.", "Add 47 and 38.", "Add 1 and 1.")
FEW: Final = 6
# Chromium's own software adapter, which computes what a GPU would.
SOFTWARE_GPU: Final = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
NO_GPU: Final = ("--disable-gpu", "--disable-features=WebGPU")


@pytest.fixture(scope="module")
def folder() -> Path:
    return page_folder()


@pytest.fixture(scope="module")
def bundle(exports: Exports) -> Path:
    return exports("cpu", ("quality=fast", "bits_per_weight=0"))


def test_webassembly_writes_what_genai_does(folder: Path, bundle: Path) -> None:
    expected = genais(bundle, list(QUESTIONS))
    for question, tokens in zip(QUESTIONS, expected, strict=True):
        with page_over(folder, bundle, query="?provider=wasm&threads=1") as page:
            expect(page.locator("#opened")).to_have_text("WebAssembly, 1 thread (as asked), context 1024")
            ids, _, said = asked(page, question)
            assert ids == tokens and said.endswith("tokens/s.")


def test_a_conversation_leaves_earlier_thoughts_out(folder: Path, exports: Exports) -> None:
    """In float32: four bits round their inputs otherwise here than there, which decides near ties."""
    bundle = exports("cpu", (), "fp32")
    conversation = toolkit.Conversation(bundle, MOST)
    with page_over(folder, bundle, query="?provider=wasm") as page:
        expect(page.locator("#opened")).to_have_text(re.compile(r"WebAssembly, \d+ threads? \(as asked\), "))
        for question in QUESTIONS:
            for _ in conversation.ask(question):
                pass
            _, text, said = asked(page, question)
            thought, _, answer = text.partition("</think>")
            made = conversation.answer
            assert said.startswith(f"{made.prompt_tokens} tokens read") and f", {made.new_tokens} written" in said
            assert (thought.strip(), answer.strip()) == (made.thought, made.text)


@pytest.fixture(scope="module")
def floats(exports: Exports) -> Path:
    """Of target webgpu in float32, which software adapters compute."""
    return exports("webgpu", (), "fp32")


def in_float32(bundle: Path, folder: Path) -> Path:
    """A bundle of target webgpu in four bits, whose float16 is widened."""
    copy = Path(shutil.copytree(bundle, folder / "wide"))
    model = _in_float32(onnx.load(bundle / "model.onnx"))
    (copy / "model.onnx").unlink()
    onnx.save(model, copy / "model.onnx")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    manifest["precision"] = "fp32"
    for entry in manifest["files"]:
        entry["bytes"] = (copy / entry["name"]).stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return copy


@contextmanager
def page_on_a_gpu(folder: Path, bundle: Path) -> Iterator[Page]:
    with page_over(folder, bundle, *SOFTWARE_GPU) as page:
        said = page.locator("#opened").text_content() or ""
        if "no WebGPU in" in said or "finds no graphics adapter" in said:
            pytest.skip(f"this Chromium has no software adapter: {said}")
        assert re.match(r"WebGPU \(.+\), context", said)
        yield page


def test_webgpu_writes_what_genai_does(folder: Path, floats: Path, exports: Exports, tmp_path: Path) -> None:
    """Whole in float32; in four bits the first tokens, as many as its software computes in seconds."""
    with page_on_a_gpu(folder, floats) as page:
        assert asked(page, QUESTIONS[0])[0] == genais(floats, [QUESTIONS[0]])[0]
    packed = exports("webgpu", ("quality=fast", "bits_per_weight=0"))
    with page_on_a_gpu(folder, in_float32(packed, tmp_path)) as page:
        assert asked(page, QUESTIONS[0], most=FEW)[0] == genais(packed, [QUESTIONS[0]])[0][:FEW]


def test_without_an_adapter_or_float16_it_says_why_it_is_webassembly(
    folder: Path, floats: Path, exports: Exports
) -> None:
    with page_over(folder, floats, *NO_GPU) as page:
        expect(page.locator("#opened")).to_have_text(
            re.compile(r"WebAssembly, \d+ threads? \((no WebGPU|WebGPU finds no)")
        )
        assert asked(page, QUESTIONS[0])[0] == genais(floats, [QUESTIONS[0]])[0]
    packed = exports("webgpu", ("quality=fast", "bits_per_weight=0"))
    with page_over(folder, packed, *SOFTWARE_GPU) as page:
        expect(page.locator("#opened")).to_have_text(re.compile(r"WebAssembly, .*(no float16|no WebGPU|no graphics)"))
        assert asked(page, QUESTIONS[0])[0] == genais(packed, [QUESTIONS[0]])[0]


def test_on_a_name_without_https_it_has_one_thread_and_says_so(folder: Path, floats: Path) -> None:
    mapped = "--host-resolver-rules=MAP example.test 127.0.0.1"
    # Chromium's console says so too, as an error.
    with page_over(folder, floats, *SOFTWARE_GPU, mapped, host="example.test", is_fine=False) as page:
        said = "no WebGPU in this browser, which browsers offer to pages of https and localhost alone"
        expect(page.locator("#opened")).to_contain_text(f"WebAssembly, 1 thread ({said}")
        assert asked(page, QUESTIONS[0])[0] == genais(floats, [QUESTIONS[0]])[0]


def test_what_cuts_an_answer_is_named(folder: Path, bundle: Path, tmp_path: Path) -> None:
    short = Path(shutil.copytree(bundle, tmp_path / "short"))
    config = json.loads((short / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["context_length"] = config["search"]["max_length"] = 40
    (short / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    with page_over(folder, short, query="?provider=wasm&threads=1") as page:
        ids, _, said = asked(page, QUESTIONS[0], most=3)
        assert len(ids) == 3 and said.endswith(", cut: as many tokens as were asked for.")
        ids, _, said = asked(page, QUESTIONS[0])
        assert said.endswith(", cut: the context is full.") and said.startswith(f"{40 - len(ids)} tokens read")
        _, _, said = asked(page, "Add 4 and 5, and " * 10)
        assert re.search(r"Error: the conversation has \d+ tokens, the bundle's context 40: start anew", said)


def _spoilt(bundle: Path, folder: Path, what: str) -> Path:
    """A bundle with something wrong about it."""
    copy = Path(shutil.copytree(bundle, folder / "b"))
    if what == "no manifest":
        (copy / "manifest.json").unlink()
    elif what == "half a file":
        data = copy / "model.onnx.data"
        data.write_bytes(data.read_bytes()[:1000])
    elif what == "no JSON":
        (copy / "tokenizer_config.json").write_text("<!doctype html>", encoding="utf-8")
    elif what == "too large":
        manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
        for entry in manifest["files"]:
            entry["bytes"] += (5 << 30) * (entry["name"] == "model.onnx.data")
        (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("no bundle", r"http://\S+/ has no genai_config\.json \(HTTP 404\): expected the folder that `toolkit export`"),
        ("no manifest", r"http://\S+/bundle/ has no manifest\.json \(HTTP 404\)"),
        ("half a file", r"model\.onnx\.data has 1000 bytes, the manifest says \d+: copy the bundle again"),
        ("no JSON", r"tokenizer_config\.json is no JSON"),
        ("too large", r"the bundle has 5\.0 GiB, WebAssembly 4: take a smaller model"),
        ("several graphs", r"the bundle is several graphs, for cpu-split: a page takes one, of target cpu or webgpu"),
    ],
)
def test_what_cannot_be_opened_is_said_in_a_line(
    folder: Path, bundle: Path, exports: Exports, tmp_path: Path, what: str, line: str
) -> None:
    shown = exports("cpu-split") if what == "several graphs" else _spoilt(bundle, tmp_path, what)
    other = "&bundle=node_modules/" if what == "no bundle" else ""
    with page_over(folder, shown, query=f"?provider=wasm{other}", is_fine=False) as page:
        status = page.get_by_role("status").text_content() or ""
        assert re.match(f"Error: .*{line}", status) and "\n" not in status
        expect(page.get_by_role("button", name="Send")).to_be_disabled()


def test_the_server_names_a_folder_without_a_bundle(tmp_path: Path) -> None:
    words = [sys.executable, str(EXAMPLE / "serve.py"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 2 and "has no genai_config.json" in done.stderr.splitlines()[-1]
