"""Bundles in older onnxruntime-genai releases, each in an environment of its own under build/: `make test-slow`."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path

import pytest

from tests.graphs import export_bundle
from tests.own_python import python_with
from tests.prompts import NEW_TOKENS, prompt_lengths, prompt_of, reference_tokens
from toolkit.bundle.settings import read_settings
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.evaluate.session import continuations
from toolkit.recipe import load_recipe

# The floor, the last before the pipeline's cache was rewritten, and the one that sizes it too small.
VERSIONS = ("0.12.2", "0.15.2", "0.16.0")
ONNXRUNTIME = "1.32.0"
# Reads {bundle, prompts: [[ids, max_length], …], new_tokens} as JSON; the last line of its output is the answer.
SCRIPT = """
import json, sys
import onnxruntime_genai as og
asked = json.loads(sys.stdin.read())
model, made = og.Model(asked["bundle"]), []
for prompt, max_length in asked["prompts"]:
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=max_length)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    tokens = []
    while len(tokens) < asked["new_tokens"] and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    made.append(tokens)
print()
print(json.dumps({"version": og.__version__, "made": made}))
"""


@pytest.fixture(scope="session", params=VERSIONS)
def genai(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A release and the Python that has it; made once and kept."""
    version = str(request.param)
    packages = (f"onnxruntime=={ONNXRUNTIME}", f"onnxruntime-genai=={version}", "numpy")
    return version, python_with(f"genai-{version}", *packages)


@pytest.fixture(scope="session")
def reference(tiny_r1: Path) -> dict[int, list[int]]:
    lengths = sorted({length for window in (8, 64) for length in prompt_lengths(window)})
    return dict(zip(lengths, reference_tokens(tiny_r1, [prompt_of(n) for n in lengths], NEW_TOKENS), strict=True))


@pytest.fixture(scope="session")
def bundles(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles by what a case asks for: target, precision and window."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}
    for target, precision, window in (
        ("cpu-split", "fp32", 64),
        ("cpu-split", "fp32", 8),
        ("cpu-split", "int4", 64),
        ("cpu", "fp32", 0),
        ("cpu", "int4", 0),
    ):
        name = f"{target} {precision} {window}"
        recipe = load_recipe(f"tiny-r1-{target}", [f"window={window}"])
        made[name] = export_bundle(recipe, open_checkpoint(tiny_r1), folder / name.replace(" ", "-"), precision)
    return made


def _continuations(genai: tuple[str, Path], bundle: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What this release makes of the prompts."""
    version, python = genai
    settings = read_settings(bundle)
    sized = [[prompt, settings.length_for(len(prompt), NEW_TOKENS)] for prompt in prompts]
    asked = json.dumps({"bundle": str(bundle), "prompts": sized, "new_tokens": NEW_TOKENS})
    done = subprocess.run([python, "-c", SCRIPT], input=asked, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["version"] == version
    return [[int(token) for token in tokens] for tokens in answer["made"]]


@pytest.mark.parametrize(("name", "window"), [("cpu-split fp32 64", 64), ("cpu-split fp32 8", 8), ("cpu fp32 0", 64)])
def test_an_older_genai_decodes_what_the_reference_decodes(
    genai: tuple[str, Path], bundles: dict[str, Path], reference: dict[int, list[int]], name: str, window: int
) -> None:
    lengths = prompt_lengths(window)
    made = _continuations(genai, bundles[name], [prompt_of(length) for length in lengths])
    assert dict(zip(lengths, made, strict=True)) == {length: reference[length] for length in lengths}


@pytest.mark.parametrize("name", ["cpu int4 0", "cpu-split int4 64"])
def test_an_older_genai_decodes_quantized_bundles_as_the_newest_does(
    genai: tuple[str, Path], bundles: dict[str, Path], name: str
) -> None:
    # The same kernels under both: eight bits make tokens of their own, and always the same.
    assert importlib.metadata.version("onnxruntime") == ONNXRUNTIME
    prompts = [prompt_of(length) for length in prompt_lengths(64)]
    made = _continuations(genai, bundles[name], prompts)
    assert made == continuations(bundles[name], prompts, NEW_TOKENS)
    assert sum(len(tokens) > 10 for tokens in made) >= 4
