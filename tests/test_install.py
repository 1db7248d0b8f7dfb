"""`toolkit install`: what each host reads stands where it looks, linked where it may be, and goes without a trace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import jsonschema
import pytest

import toolkit
from tests.command_line import called
from tests.exports import Exports
from toolkit.errors import BundleError, RecipeError, UnsupportedError
from toolkit.evaluate.conversation import Conversation
from toolkit.files import write_json
from toolkit.hosts.installable import PROVIDER_NAMES, plain_name
from toolkit.hosts.words import HOSTS
from toolkit.report.intact import verify_bundle
from toolkit.target import TARGETS

QUESTION = "Add 4 and 5."
# https://learn.microsoft.com/windows/ai/new-windows-ml/model-catalog/model-catalog-source, its required properties.
CATALOG_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["models"],
    "properties": {
        "models": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "name", "version", "publisher", "executionProviders", "license", "files"],
                "properties": {
                    "id": {"type": "string"},
                    "executionProviders": {"type": "array", "items": {"required": ["name"]}, "minItems": 1},
                    "modelSizeBytes": {"type": "integer"},
                    "files": {
                        "type": "array",
                        "items": {
                            "required": ["name", "uri", "sha256"],
                            "properties": {
                                "uri": {"pattern": "^(file|https)://"},
                                "sha256": {"pattern": "^[0-9a-f]{64}$"},
                            },
                        },
                    },
                },
            },
        }
    },
}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("target", ["cpu", "cpu-split", "qnn"])
def test_foundry_local_finds_name_prompt_and_markers(exports: Exports, tmp_path: Path, target: str) -> None:
    bundle = exports(target)
    (made,) = toolkit.install(bundle, to="foundry-local", root=tmp_path)
    folder = Path(made.folder)
    suffix = {"cpu": "generic-cpu", "cpu-split": "split-generic-cpu", "qnn": "qnn-npu"}[target]
    assert folder == tmp_path / "toolkit" / f"tiny-r1-{suffix}"
    said, registered = _json(folder / "inference_model.json"), _json(folder / "foundry_local.json")
    assert said["Name"] == registered["model_id"] == f"tiny-r1-{suffix}:1"
    template = _json(bundle / "tokenizer_config.json")["chat_template"]
    expected = jinja2.Template(template, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False).render(
        messages=[{"role": "user", "content": "{Content}"}],
        add_generation_prompt=True,
        bos_token=_json(bundle / "tokenizer_config.json")["bos_token"],
    )
    assert said["PromptTemplate"] == {"assistant": "{Content}", "prompt": expected}
    known = registered["metadata"]
    assert (known["supports_reasoning"], known["reasoning_start"], known["reasoning_end"]) == (1, "<think>", "</think>")
    assert any("QNNExecutionProvider first" in note for note in made.notes) == (target == "qnn")
    assert not {"manifest.json", "report.json", "report.html"} & set(_tree(folder))


def test_an_installed_bundle_runs_as_the_bundle_does_and_shares_its_weights(exports: Exports, tmp_path: Path) -> None:
    bundle = exports("cpu")
    (made,) = toolkit.install(bundle, to="foundry-local", root=tmp_path)
    answers = ["".join(Conversation(folder, 200).ask(QUESTION)) for folder in (bundle, Path(made.folder))]
    assert answers[0] == answers[1] and "</think>" in answers[0]
    placed = Path(made.folder)
    assert os.path.samefile(placed / "model.onnx.data", bundle / "model.onnx.data")
    assert not os.path.samefile(placed / "genai_config.json", bundle / "genai_config.json")


def test_without_hard_links_files_are_copied(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    (made,) = toolkit.install(exports("cpu"), to="foundry-local", root=tmp_path)
    placed = Path(made.folder) / "model.onnx.data"
    assert placed.read_bytes() == (exports("cpu") / "model.onnx.data").read_bytes()
    assert not os.path.samefile(placed, exports("cpu") / "model.onnx.data")


def test_uninstall_leaves_what_others_put_there(exports: Exports, tmp_path: Path) -> None:
    before = _tree(exports("cpu"))
    (made,) = toolkit.install(exports("cpu"), to="foundry-local", root=tmp_path)
    folder = Path(made.folder)
    (folder / "download.tmp").write_text("the host's", encoding="utf-8")
    assert toolkit.uninstall(folder) == ["download.tmp"]
    assert list(_tree(folder)) == ["download.tmp"]
    (folder / "download.tmp").unlink()
    toolkit.install(exports("cpu"), to="foundry-local", root=tmp_path)
    toolkit.install(exports("cpu"), to="foundry-local", root=tmp_path)  # again, in its place
    done = called("uninstall", str(folder), "--json")
    assert json.loads(done.stdout) == {"removed": str(folder), "left": []} and not folder.exists()
    assert _tree(exports("cpu")) == before and verify_bundle(exports("cpu")).problems == ()


def test_what_is_not_ours_is_not_touched(exports: Exports, tmp_path: Path) -> None:
    folder = tmp_path / "toolkit" / "tiny-r1-generic-cpu"
    folder.mkdir(parents=True)
    (folder / "genai_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RecipeError, match="`toolkit install` did not make it"):
        toolkit.install(exports("cpu"), to="foundry-local", root=tmp_path)
    with pytest.raises(BundleError, match="was not made by `toolkit install`"):
        toolkit.uninstall(folder)
    with pytest.raises(RecipeError, match="is a model itself"):
        toolkit.install(exports("cpu"), to="foundry-local", root=folder)
    assert _tree(tmp_path) == {"toolkit/tiny-r1-generic-cpu/genai_config.json": b"{}"}


def test_a_forged_list_removes_nothing_outside(exports: Exports, tmp_path: Path) -> None:
    (made,) = toolkit.install(exports("cpu"), to="foundry-local", root=tmp_path / "root")
    victim = tmp_path / "root" / "toolkit" / "mine.txt"
    victim.write_text("mine", encoding="utf-8")
    from toolkit.files import write_state
    from toolkit.hosts.installation import Installed, InstalledFile

    listed = (InstalledFile("../mine.txt"), InstalledFile(str(victim)))
    write_state(Path(made.folder) / ".toolkit-install.json", Installed("foundry-local", (), listed))
    toolkit.uninstall(made.folder)
    assert victim.read_text(encoding="utf-8") == "mine"


def test_a_dry_run_writes_nothing(exports: Exports, tmp_path: Path) -> None:
    done = called("install", str(exports("cpu")), "--to", "ai-toolkit", "--root", str(tmp_path), "--dry-run")
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
    assert "would make" in done.stdout and "model.onnx.data: the bundle's" in done.stdout


def test_ai_toolkit_has_four_layers(exports: Exports, tmp_path: Path) -> None:
    (made,) = toolkit.install(exports("qnn"), to="ai-toolkit", root=tmp_path, name="My R1")
    folder = Path(made.folder)
    assert folder.relative_to(tmp_path).parts == ("toolkit", "my-r1", "qnn-npu", "my-r1-qnn-npu")
    assert _json(folder / "inference_model.json")["Name"] == "my-r1-qnn-npu"


def test_lemonade_gets_an_entry_and_takes_what_it_runs(exports: Exports, tmp_path: Path) -> None:
    (made,) = toolkit.install(exports("vitisai"), to="lemonade", root=tmp_path)
    (entry,) = _json(Path(made.folder) / "user_models.entry.json").values()
    # Without the source Lemonade looks for a repository of that name.
    place = {"checkpoint": made.folder, "source": "local_path"}
    assert entry == {**place, "recipe": "ryzenai-llm", "labels": ["custom", "reasoning"]}
    for target, provider in (("cpu", "CPU"), ("qnn", "QNN")):
        with pytest.raises(UnsupportedError, match=f"VitisAI.*, and this one is for {provider}ExecutionProvider"):
            toolkit.install(exports(target), to="lemonade", root=tmp_path)
    assert not (tmp_path / "user_models.json").exists()


def test_the_catalogue_names_files_that_are_there(exports: Exports, tmp_path: Path) -> None:
    (made,) = toolkit.install(exports("cpu"), to="windows-ml-catalog", root=tmp_path)
    catalog = _json(Path(made.folder) / "catalog.json")
    jsonschema.validate(catalog, CATALOG_SCHEMA)
    (model,) = catalog["models"]
    # tiny-r1's, which the toolkit knows.
    assert model["license"] == "mit" and not any("--license" in note for note in made.notes)
    assert model["executionProviders"] == [{"name": "CPUExecutionProvider"}]
    sizes = 0
    for file in model["files"]:
        path = Path(exports("cpu")) / file["name"]
        assert path.as_uri() == file["uri"] and hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]
        sizes += path.stat().st_size
    assert model["modelSizeBytes"] == sizes
    options = ["--base-url", "https://example.org/r1/", "--root", str(tmp_path), "--license", "other-than-that"]
    done = called("install", str(exports("cpu")), "--to", "windows-ml-catalog", *options)
    (hosted_model,) = _json(Path(made.folder) / "catalog.json")["models"]
    hosted = hosted_model["files"]
    assert done.returncode == 0 and hosted_model["license"] == "other-than-that"
    assert hosted[0]["uri"] == f"https://example.org/r1/{hosted[0]['name']}"


def test_a_package_has_a_variant_a_provider_and_one_tokenizer(exports: Exports, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    (made,) = toolkit.install(exports("cpu"), exports("qnn"), to="package", root=tmp_path)
    folder = Path(made.folder)
    assert folder.name == "tiny-r1.ortpackage" and not (folder / "genai_config.json").exists()
    manifest = _json(folder / "manifest.json")
    variants = manifest["components"]["model"]["variants"]
    assert manifest["schema_version"] == "1.0"
    assert {name: row["ep"] for name, row in variants.items()} == {
        "cpu": "CPUExecutionProvider",
        "qnn": "QNNExecutionProvider",
    }
    (asset,) = (folder / "shared_assets").iterdir()
    lines = sorted(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in asset.iterdir())
    assert asset.name == f"sha256-{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
    for variant in variants:
        assert _json(folder / variant / "genai_config.json")["model"]["tokenizer_dir"] == asset.name.replace(
            "-", ":", 1
        )
        assert not (folder / variant / "tokenizer.json").exists()
    # As a reader puts it together: the variant, and the tokenizer where its settings say.
    whole = Path(shutil.copytree(folder / "cpu", tmp_path / "whole"))
    shutil.copytree(asset, whole, dirs_exist_ok=True)
    settings = _json(whole / "genai_config.json")
    del settings["model"]["tokenizer_dir"]
    (whole / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
    answers = ["".join(Conversation(place, 200).ask(QUESTION)) for place in (whole, exports("cpu"))]
    assert answers[0] == answers[1]
    try:
        assert og.Model(og.Config.from_package_ep(str(folder), "cpu"))
    except RuntimeError as problem:  # the wheels of 0.18.0 are built without the reader
        assert "requires building onnxruntime-genai against ONNX Runtime" in str(problem)


def _named(name: str) -> Callable[[Path], object]:
    return lambda folder: write_json(folder / "inference_model.json", {"Name": name, "PromptTemplate": None})


def _another_tokenizer(package: Path) -> None:
    next(package.glob("shared_assets/*/tokenizer.json")).write_text("{}", encoding="utf-8")


FAULTS: dict[str, list[tuple[Callable[[Path], object], str]]] = {
    "foundry-local": [
        (_named("tiny-r1-generic-cpu"), "expected a version behind a colon"),
        (_named("tiny-r1-qnn-npu:1"), "the settings are for generic-cpu"),
        (lambda folder: (folder / "download.tmp").touch(), "a download that has not ended"),
        (lambda folder: (folder.parent / "genai_config.json").touch(), "is a model itself"),
        (lambda folder: (folder / "model.onnx").unlink(), "model.onnx is missing: install the bundle again"),
    ],
    "ai-toolkit": [
        (_named("another"), "the folder is called 'tiny-r1-generic-cpu'"),
        (
            lambda folder: (folder / "inference_model.json").write_text("[", encoding="utf-8"),
            "install the bundle again",
        ),
    ],
    "lemonade": [
        (
            lambda folder: write_json(folder / "user_models.entry.json", {"a": {"checkpoint": "/b"}}),
            "is elsewhere by now",
        )
    ],
    "windows-ml-catalog": [
        (lambda folder: _moved(folder / "catalog.json"), "model.onnx is no longer at file:///nowhere/model.onnx")
    ],
    "package": [
        (_another_tokenizer, "is not what lies in shared_assets"),
        (lambda folder: (folder / "genai_config.json").touch(), "takes it for a plain model"),
    ],
}


def _moved(catalog: Path) -> None:
    file = {"name": "model.onnx", "uri": "file:///nowhere/model.onnx"}
    write_json(catalog, {"models": [{"files": [file]}]})


@pytest.mark.parametrize("host", HOSTS)
def test_check_knows_what_an_installed_folder_needs(host: str, exports: Exports, tmp_path: Path) -> None:
    bundle = exports("vitisai" if host == "lemonade" else "cpu")
    (made,) = toolkit.install(bundle, to=host, root=tmp_path / "root")
    assert toolkit.check(made.folder).problems == ()
    for k, (harm, words) in enumerate(FAULTS[host]):
        root = Path(shutil.copytree(tmp_path / "root", tmp_path / f"root-{k}"))
        folder = root / Path(made.folder).relative_to(tmp_path / "root")
        if host == "lemonade" and k == 0:
            assert "is elsewhere by now" in toolkit.check(folder).problems[0]
        harm(folder)
        found = toolkit.check(folder)
        assert not found.passed and any(words in line for line in found.problems), found.problems


def test_what_cannot_be_installed_is_one_line(exports: Exports, tiny_r1: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="two bundles are for CPUExecutionProvider"):
        toolkit.install(exports("cpu"), exports("cpu-split"), to="package", root=tmp_path)
    with pytest.raises(RecipeError, match=r"two bundles would be .*: install them one by one"):
        toolkit.install(exports("cpu"), exports("cpu"), to="ai-toolkit", root=tmp_path)
    assert not (tmp_path / "toolkit").exists()
    with pytest.raises(RecipeError, match="no host is called 'ollama'"):
        toolkit.install(exports("cpu"), to="ollama")
    plans = toolkit.plan("cpu", checkpoint=tiny_r1, synthetic=True, out=tmp_path / "b", changes=["context_length=64"])
    (random,) = toolkit.export(plans)
    with pytest.raises(BundleError, match="has no words"):
        toolkit.install(random, to="foundry-local", root=tmp_path)
    broken = exports.copy(tmp_path / "broken", "cpu")
    settings = _json(broken / "genai_config.json")
    settings["model"]["vocab_size"] = 3
    (broken / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
    done = called("install", str(broken), "--to", "foundry-local", "--root", str(tmp_path))
    assert (
        done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and "toolkit check" in done.stderr
    )


def test_every_target_has_a_name_for_hosts() -> None:
    assert {target.accelerator.execution_provider for target in TARGETS.values()} == set(PROVIDER_NAMES)


@pytest.mark.parametrize(("word", "name"), [("My R1!", "my-r1"), ("a/../b", "a-..-b"), ("..", None), ("日本", None)])
def test_names_cannot_leave_their_folder(word: str, name: str | None) -> None:
    if name is None:
        with pytest.raises(BundleError, match="no letter or digit"):
            plain_name(word)
    else:
        assert plain_name(word) == name
