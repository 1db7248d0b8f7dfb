"""A bundle that stands where one is to be made: kept if it is the same, never lost once it was validated."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.graphs import EIGHT_BITS
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.errors import BundleError, RecipeError
from toolkit.pipeline.export import Order, export_planned, plan_exports
from toolkit.pipeline.judge import Effort, judge_bundle
from toolkit.recipe import load_recipe
from toolkit.report.summary import validated_report

EFFORT = Effort(tokens=64, tasks=False, speed=False, baseline=False)


@pytest.fixture
def folder(tiny_r1: Path, tmp_path: Path) -> Path:
    """A checkpoint that can be changed."""
    return Path(shutil.copytree(tiny_r1, tmp_path / "checkpoint"))


def _export(folder: Path, out: Path, changes: tuple[str, ...] = (), force: bool = False) -> list[str]:
    """What was said while a bundle was made, or not."""
    said: list[str] = []
    recipe = load_recipe("tiny-r1-cpu", [*EIGHT_BITS, *changes])
    plans = plan_exports([Order(recipe, out)], _opened(folder))
    assert export_planned(plans, force=force, note=said.append) == [out]
    return said


def _opened(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


def _made_at(out: Path) -> int:
    return (out / "model.onnx.data").stat().st_mtime_ns


def _flip(path: Path) -> None:
    """Changes one weight a little, and neither size nor time of change."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(stat.st_size - 2)
        byte = file.read(1)
        file.seek(stat.st_size - 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_same_request_keeps_the_bundle(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert _export(folder, out) == []
    made = _made_at(out)
    (said,) = _export(folder, out)
    assert str(out) in said and "kept" in said and "--force" in said and _made_at(out) == made
    for path in folder.iterdir():  # as a fresh copy of the same files has it, or what is rebuilt from a GGUF file
        os.utime(path)
    assert "kept" in _export(folder, out)[0] and _made_at(out) == made
    assert not out.with_name("b.partial").exists()
    assert _export(folder, out, force=True) == [] and _made_at(out) > made


@pytest.mark.parametrize("what", ["recipe", "weights", "tokenizer", "config", "template", "damaged", "missing"])
def test_anything_else_makes_it_anew(folder: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "b"
    _export(folder, out)
    made = _made_at(out)
    changes: tuple[str, ...] = ()
    if what == "recipe":
        changes = ("context_length=128",)
    elif what == "weights":
        _flip(folder / "model.safetensors")
    elif what == "tokenizer":
        path = folder / "tokenizer.json"
        stat = path.stat()
        path.write_bytes(path.read_bytes() + b"\n")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif what == "config":
        (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b"\n")
    elif what == "template":
        # One that went into another file of the bundle, and is as old as ever.
        (folder / "chat_template.jinja").write_text("{% if true %}\n{{ messages[0].content }}{% endif %}")
        os.utime(folder / "chat_template.jinja", ns=(0, 0))
        _export(folder, out)
        made = _made_at(out)
        (folder / "chat_template.jinja").write_text("{% if true %}\n{{ messages[1].content }}{% endif %}")
        os.utime(folder / "chat_template.jinja", ns=(0, 0))
    elif what == "damaged":
        os.truncate(out / "model.onnx.data", 10)
        made = 0
    else:
        (out / "model.onnx").unlink()
    assert _export(folder, out, changes) == []
    assert _made_at(out) > made and (out / "model.onnx").is_file()


def test_a_validated_bundle_is_replaced_by_force_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    _export(folder, out)
    assert validated_report(out) is None
    judge_bundle(out, _opened(folder), EFFORT)
    made, report = _made_at(out), validated_report(out)
    assert report and report.verdict
    # Its own request finds it, and its figures stay.
    assert "kept" in _export(folder, out)[0] and validated_report(out) == report
    with pytest.raises(RecipeError, match=r"is a validated bundle of another .*--force"):
        _export(folder, out, ("context_length=128",))
    assert _made_at(out) == made
    _export(folder, out, ("context_length=128",), force=True)
    assert _made_at(out) > made and validated_report(out) is None


def test_a_bundle_that_is_not_as_it_was_made_is_not_validated(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    _export(folder, out)
    _flip(out / "model.onnx.data")
    with pytest.raises(BundleError, match=r"model\.onnx\.data differs from its SHA-256: `toolkit verify"):
        judge_bundle(out, _opened(folder), EFFORT)
