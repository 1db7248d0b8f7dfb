"""Installed bundles in Foundry Local itself, whose SDK is put into an environment of its own: `make test-slow`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import toolkit
from tests.graphs import export_bundle
from tests.own_python import python_with
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.evaluate.conversation import Conversation
from toolkit.recipe import load_recipe

VERSION = "2.2.1"
QUESTIONS = ("Add 4 and 5.", "Add 7 and 8.")
# Reads {home, folder, questions} as JSON; the last line of its output has, a turn, the parts of the answer by kind.
SCRIPT = """
import importlib.util, json, sys
from foundry_local_sdk import *
asked = json.loads(sys.stdin.read())
spec = importlib.util.spec_from_file_location("register", asked["folder"] + "/register_in_foundry_local.py")
registration = importlib.util.module_from_spec(spec)
spec.loader.exec_module(registration)
FoundryLocalManager.initialize(
    Configuration(app_name="toolkit-test", app_data_dir=asked["home"], model_cache_dir=asked["home"] + "/cache")
)
catalog = FoundryLocalManager.instance.get_catalog(CatalogType.LOCAL)
registration.register(catalog)
model = registration.register(catalog)
model.load()
turns = []
with ChatSession(model) as session:
    session.set_options(RequestOptions(search=SearchOptions(temperature=0.0, max_output_tokens=256)))
    for question in asked["questions"]:
        with Request().add_item(MessageItem.user(question)) as request:
            with session.process_request(request) as response:
                parts = [part for item in response for part in item.parts]
                turns.append([[part.type.name, part.text] for part in parts])
model.unload()
print()
print(json.dumps({"id": model.id, "turns": turns}))
"""


@pytest.fixture(scope="session")
def python() -> Path:
    """The Python that has the SDK; made once and kept."""
    return python_with(f"foundry-local-{VERSION}", f"foundry-local-sdk=={VERSION}")


@pytest.mark.parametrize(("target", "precision"), [("cpu", "int4"), ("cpu", "fp32"), ("cpu-split", "int4")])
def test_it_registers_loads_and_answers_thought_apart(
    python: Path, tiny_r1: Path, tmp_path: Path, target: str, precision: str
) -> None:
    recipe = load_recipe(f"tiny-r1-{target}", ["quality=fast", "bits_per_weight=0"])
    bundle = export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path / "bundle", precision)
    (made,) = toolkit.install(bundle, to="foundry-local", root=tmp_path / "models")
    asked = {"home": str(tmp_path / "home"), "folder": made.folder, "questions": QUESTIONS}
    done = subprocess.run(
        [python, "-c", SCRIPT], input=json.dumps(asked), capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: Any = json.loads(done.stdout.splitlines()[-1])
    assert said["id"] == f"{Path(made.folder).name}:1"
    conversation = Conversation(bundle, 256)
    for question, turn in zip(QUESTIONS, said["turns"], strict=True):
        for _ in conversation.ask(question):
            pass
        ours = conversation.answer
        assert [(kind, text.strip()) for kind, text in turn] == [("REASONING", ours.thought), ("DEFAULT", ours.text)]
