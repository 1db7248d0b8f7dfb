"""A trained model in a browser's page: SmolLM2 on WebAssembly writes what onnxruntime-genai does."""

from __future__ import annotations

from pathlib import Path

from benchmarks.models import SMOLLM2, fetch
from tests.browser_page import asked, genais, page_folder, page_over
from tests.graphs import export_bundle
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.recipe import load_recipe

QUESTIONS = ("What is the capital of France?", "Name three colours.")
FEW = 8


def test_smollm2_writes_in_a_page_what_genai_does(tmp_path: Path) -> None:
    """In four bits, as it would be served; a token takes WebAssembly a second."""
    folder, checkpoint = page_folder(), open_checkpoint(fetch(SMOLLM2))
    recipe = load_recipe("cpu", ["quality=fast", "context_length=4096"], "smollm2")
    bundle = export_bundle(recipe, checkpoint, tmp_path / "b", "int4")
    made = []
    for question in QUESTIONS:
        with page_over(folder, bundle, query="?provider=wasm") as page:
            made.append(asked(page, question, FEW)[0])
    assert made == genais(bundle, list(QUESTIONS), FEW)
