"""`toolkit verify`: what was changed, added or taken away after a bundle was made, the manifest and the reports too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import called
from tests.exports import Exports
from toolkit.bundle.manifest import read_manifest
from toolkit.errors import BundleError
from toolkit.files import write_json
from toolkit.pipeline.compile import compile_bundle
from toolkit.report.intact import verify_bundle
from toolkit.report.sections import NotMeasured
from toolkit.report.summary import amend_report


def _edit(name: str, key: str, value: object) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        raw = json.loads((bundle / name).read_text(encoding="utf-8"))
        assert raw.get(key) != value
        write_json(bundle / name, {**raw, key: value})

    return edit


def _text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        text = (bundle / name).read_text(encoding="utf-8")
        assert old in text
        (bundle / name).write_text(text.replace(old, new, 1), encoding="utf-8", newline="\n")

    return edit


def _unlisted(bundle: Path) -> None:
    raw = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    raw["files"] = [entry for entry in raw["files"] if entry["name"] != "model.onnx"]
    write_json(bundle / "manifest.json", raw)


CHANGED = {
    "a value of the manifest": (_edit("manifest.json", "synthetic", True), "manifest.json was changed"),
    "a hash of the manifest": (_text("manifest.json", '"sha256": "', '"sha256": "0'), "manifest.json was changed"),
    "a file left out of the manifest": (_unlisted, "model.onnx is extra"),
    "a figure of the report": (_text("report.json", '"wall_s": ', '"wall_s": 1'), "report.json was changed"),
    "another bundle's report": (_edit("report.json", "recipe", "14b-cpu"), "report.json"),
    "a report without digest": (lambda bundle: (bundle / "report.json").unlink(), "report.json is missing"),
    "the page": (_text("report.html", "<body", "<body  "), "report.html was changed"),
    "the end of the page": (_text("report.html", "<!-- sha256", "<!-- sha"), "report.html was changed"),
    "no page": (lambda bundle: (bundle / "report.html").unlink(), "report.html is missing"),
    "a file beside": (lambda bundle: (bundle / "report.json.old").write_text("{"), "report.json.old is extra"),
    "a folder beside": (lambda bundle: (bundle / "onnx").mkdir(), "onnx is extra"),
    "settings": (_text("genai_config.json", "0", "1"), "genai_config.json differs from its SHA-256"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_was_changed_is_named(exports: Exports, tmp_path: Path, what: str) -> None:
    bundle, (change, said) = exports.copy(tmp_path / "b", "cpu"), CHANGED[what]
    assert verify_bundle(bundle).problems == ()
    change(bundle)
    assert any(said in problem for problem in verify_bundle(bundle).problems)


def test_a_report_that_is_written_again_is_no_change(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    amend_report(bundle, lambda report: report, [NotMeasured("speed", "… naïve 你好 \u2028")])
    assert verify_bundle(bundle).problems == ()


def test_files_of_hosts_are_named_and_are_no_fault(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    (bundle / "inference_model.json").write_text('{"Name": "tiny:1"}', encoding="utf-8")
    said = called("verify", str(bundle))
    assert said.returncode == 0 and "note: inference_model.json is extra" in said.stderr
    (bundle / "notes.txt").write_text("mine", encoding="utf-8")
    said = called("verify", str(bundle))
    assert said.returncode == 1 and said.stdout == "notes.txt is extra: the manifest does not name it\n"


def test_what_a_kill_left_is_named_and_is_no_fault(exports: Exports, tmp_path: Path) -> None:
    """Half a report beside the whole one, the mark of the work folder, and the work of a compiler beside the bundle."""
    bundle = exports.copy(tmp_path / "b", "cpu")
    (bundle / "request.json").write_text("{}", encoding="utf-8")
    (bundle / "report.json.new").write_text("{", encoding="utf-8")
    (tmp_path / "b.compile").mkdir()
    said = called("verify", str(bundle))
    assert said.returncode == 0 and "note: report.json.new is left of a command that was killed" in said.stderr
    assert "note: request.json is left of a command that was killed" in said.stderr
    assert f"`toolkit compile {bundle}` goes on" in said.stderr
    (bundle / "notes.txt.new").write_text("mine", encoding="utf-8")
    said = called("verify", str(bundle))
    assert said.returncode == 1 and said.stdout == "notes.txt.new is extra: the manifest does not name it\n"


def test_a_bundle_of_before_has_no_digests(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    for name in ("manifest.json", "report.json"):
        raw = json.loads((bundle / name).read_text(encoding="utf-8"))
        del raw["digest"]
        write_json(bundle / name, raw)
    page = (bundle / "report.html").read_text(encoding="utf-8")
    (bundle / "report.html").write_text(page.partition("<!-- sha256")[0], encoding="utf-8")
    assert verify_bundle(bundle).problems == ()


def test_an_edited_manifest_is_not_signed_anew(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "b", "qnn")
    _edit("manifest.json", "precision", "fp32")(bundle)
    with pytest.raises(BundleError, match=r"manifest\.json was changed after it was written"):
        compile_bundle(bundle)
    assert read_manifest(bundle).precision == "fp32"
