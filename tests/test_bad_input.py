"""Hostile and broken input: exit code 2, one clear line, nothing half-made that looks whole."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import called
from tests.exports import Exports
from tests.graphs import EIGHT_BITS, SET_EIGHT_BITS, export_bundle
from toolkit.bundle.manifest import read_manifest
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.errors import BundleError, MachineError, RecipeError
from toolkit.evaluate.session import open_model
from toolkit.pipeline import plan
from toolkit.pipeline.check import check_bundle
from toolkit.pipeline.export import Order, export_bundles
from toolkit.recipe import load_recipe


def _export(checkpoint: Path, out: Path, recipe: str = "cpu") -> subprocess.CompletedProcess[str]:
    words = ["--checkpoint", str(checkpoint), "--out", str(out), "--no-validate", "--set", "context_length=1024"]
    return called("export", recipe, *words)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def _corrupt_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"!!!!"
    path.write_bytes(data)


def _edit_config(key: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")

    return edit


def _not_a_number(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start = 8 + length + json.loads(data[8 : 8 + length])["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    data[start : start + 2] = b"\xc0\x7f"
    path.write_bytes(data)


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _escaping_index(folder: Path) -> None:
    text = json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (_truncate, "truncated"),
    "header larger than its file": (_huge_header, "claims a header of"),
    "corrupt header": (_corrupt_header, "corrupt header"),
    "missing tensors": (_edit_config("num_hidden_layers", 5), "lacks 12 tensors"),
    "unused tensors": (_edit_config("num_hidden_layers", 3), "does not call for"),
    "wrong shape": (_edit_config("intermediate_size", 512), "expected [512, 256]"),
    "unknown family": (_edit_config("model_type", "gpt9"), "'gpt9' is not supported"),
    "unknown rope": (_edit_config("rope_scaling", {"rope_type": "dynamic", "factor": 2}), "'dynamic'"),
    "context too long": (_edit_config("max_position_embeddings", 512), "--set context_length=512"),
    "NaN weight": (_not_a_number, "model.layers.1.mlp.up_proj.weight holds 1 NaN"),
    "pickle": (_pickle_only, "never loaded"),
    "index that leaves the folder": (_escaping_index, "plain file name"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_checkpoint_is_refused_with_one_line(case: str, tiny_r1: Path, tmp_path: Path) -> None:
    damage, message = CASES[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_r1, folder)
    damage(folder)
    done = _export(folder, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_shape_than_the_recipes_is_refused(tiny_r1: Path, tmp_path: Path) -> None:
    done = _export(tiny_r1, tmp_path / "out", "14b-cpu")
    assert done.returncode == 2
    assert "DeepSeek-R1-Distill-Qwen-14B with hidden_size 5120, the checkpoint has 256" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_whose_last_block_is_not_whole_is_refused(stories260k: Path, tmp_path: Path) -> None:
    """ONNX Runtime would look up rows of 128 where there are 64 channels, and refuse the graph."""
    rules = 'quantize=[{"match": "*", "block_size": 128}]'
    with pytest.raises(RecipeError, match=r"embed_tokens.* blocks of 128: hidden_size 64 is not a multiple"):
        recipe = load_recipe("cpu", ["context_length=512", rules], str(stories260k))
        export_bundle(recipe, open_checkpoint(stories260k), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_loses_nothing(tiny_r1: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="a file size limit stands in for a full disk, on POSIX alone")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY));"
        "from toolkit.cli.commands import main; sys.argv = sys.argv[1:]; main()"
    )
    out = tmp_path / "out"
    words = ["toolkit", "export", "tiny-r1-cpu", "--out", str(out), "--no-validate", *SET_EIGHT_BITS]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and "free space and run again" in done.stderr and "Traceback" not in done.stderr
    assert not out.exists() and resource.RLIM_INFINITY
    again = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, encoding="utf-8")
    assert again.returncode == 0 and out.is_dir() and not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "quantize.0.bits=5"], "quantize rule 1: 5 bits"),
        (["--set", "quantise.0.bits=8"], "the recipe has no 'quantise.0.bits'"),
        (["--set", "context_length"], "expected key=value"),
        (["--set", "target=qpu"], "target 'qpu' is unknown (did you mean 'cpu'?)"),
        (["--set", "quantize.0.algorithm=kqant"], "did you mean 'kquant'?"),
        (["--set", "validate.mean_kdl=0.1"], "no figure 'mean_kdl' (did you mean 'mean_kld'?)"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_bad_request_is_refused_with_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    done = called("export", "tiny-r1-cpu", "--out", str(tmp_path / "out"), *words)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_or_memory_is_said_before_anything_is_written(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, checkpoint = load_recipe("tiny-r1-cpu", EIGHT_BITS), open_checkpoint(tiny_r1)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
        with pytest.raises(MachineError, match="the disk has 1 MiB free"):
            export_bundle(recipe, checkpoint, tmp_path / "out")
    monkeypatch.setattr(plan, "free_memory_bytes", lambda: 1 << 20)
    with pytest.raises(MachineError, match="1 MiB of memory are free"):
        export_bundle(recipe, checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unknown_recipe_key_names_the_nearest(tiny_r1: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    text = "name: r\nmodel: tiny-r1\ntarget: cpu\ncontext_lenght: 64\nquantize: [{match: '*'}]\nvalidate: {}\n"
    recipe.write_text(text, encoding="utf-8")
    done = _export(tiny_r1, tmp_path / "out", str(recipe))
    assert done.returncode == 2
    assert "unknown key 'context_lenght' (did you mean 'context_length'?)" in done.stderr


def test_a_foreign_folder_is_not_overwritten(tiny_r1: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine", encoding="utf-8")
    assert _export(tiny_r1, tmp_path / "out").returncode == 2
    assert (tmp_path / "out" / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_no_bundle_inside_another_and_none_with_folders_is_replaced(
    tiny_r1: Path, exports: Exports, tmp_path: Path
) -> None:
    recipe, checkpoint = load_recipe("tiny-r1-cpu", EIGHT_BITS), open_checkpoint(tiny_r1)
    out = exports.copy(tmp_path / "out", "cpu")
    with pytest.raises(RecipeError, match="is a bundle itself"):
        export_bundle(recipe, checkpoint, out / "inner")
    (out / "notes").mkdir()
    with pytest.raises(RecipeError, match="folders inside, which would be lost"):
        export_bundle(recipe, checkpoint, out)
    assert (out / "notes").is_dir() and not (tmp_path / "out.partial").exists()


def test_nothing_is_written_before_every_place_is_looked_at(tiny_r1: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    places = {"tiny-r1-qnn": tmp_path / "free", "tiny-r1-cpu": tmp_path / "taken"}
    orders = [Order(load_recipe(name), place) for name, place in places.items()]
    with pytest.raises(RecipeError, match="is not a bundle"):
        export_bundles(orders, open_checkpoint(tiny_r1))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["recipe"].update(target="gone"), "which this toolkit does not know"),
        (lambda m: m.pop("recipe"), "says nothing of recipe"),
        (lambda m: m.pop("synthetic"), "says nothing of synthetic"),
        (lambda m: m.update(files=[1]), r"files\[0\] is 1, expected an object: export it again"),
        (lambda m: m["files"][1].pop("bytes"), r"files\[1\] has no 'bytes'"),
        (lambda m: m["files"][1].update(sha256=None), r"files\[1\].sha256 is None, expected text"),
        (lambda m: m["files"][1].update(bytes="many"), r"files\[1\].bytes is 'many', expected a whole number"),
        (lambda m: m.update(synthetic="no"), "synthetic is 'no', expected true or false"),
        (lambda m: m.update(checkpoint={}), "checkpoint is {}, expected an array"),
        (lambda m: m.update(recipe=[]), "recipe names no target"),
        (lambda m: m["recipe"].update(context_length="long"), "context_length is 'long'"),
        (lambda m: m["recipe"].update(quantize=[{"match": 3}]), "match is 3"),
    ],
)
def test_a_manifest_of_another_toolkit_is_named(
    edit: Callable[[dict[str, Any]], object], message: str, exports: Exports, tmp_path: Path
) -> None:
    bundle = exports.copy(tmp_path / "out", "qnn")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest["recipe"].pop("window")  # as older ones are
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert check_bundle(bundle, run=False).passed and read_manifest(bundle).recipe.window == 64
    edit(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        check_bundle(bundle, run=False)


@pytest.mark.parametrize("text", ["{}", '{"model": {"decoder": {"pipeline": [1]}}}', '{"model": [], "search": {}}'])
def test_settings_that_are_not_whole_are_named(text: str, exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "out", "cpu")
    (bundle / "genai_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"is not whole: .*: see `toolkit check"):
        open_model(bundle)
    assert not check_bundle(bundle, run=False).passed
