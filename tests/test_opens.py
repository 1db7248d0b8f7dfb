"""An export ends with onnxruntime-genai opening the bundle: model, tokenizer and template, each tried once more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exports import Exports
from toolkit.apart import run_apart
from toolkit.bundle.chat_template import shipped_template, special_tokens
from toolkit.errors import BundleError
from toolkit.evaluate import opens
from toolkit.evaluate.opens import Words, open_apart
from toolkit.evaluate.renders import TemplateJob
from toolkit.files import write_json
from toolkit.report.sections import NotMeasured, Opened
from toolkit.report.summary import load_report


@pytest.fixture(autouse=True)
def _as_users_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which other tests spare themselves."""
    monkeypatch.setattr(opens, "run_apart", run_apart)


@pytest.fixture(scope="module")
def words(tiny_r1: Path) -> Words:
    shipped = shipped_template(tiny_r1)
    assert shipped is not None
    return Words(str(tiny_r1 / "tokenizer.json"), (), TemplateJob(shipped.text, special_tokens(tiny_r1)))


@pytest.mark.parametrize("target", ["cpu", "cpu-split", "qnn"])
def test_a_bundle_is_open_when_its_export_ends(exports: Exports, target: str, words: Words) -> None:
    bundle = exports(target)
    conversion = load_report(bundle).conversion
    assert conversion is not None and conversion.opened is not None
    assert conversion.opened.runtime.startswith("onnxruntime-genai ")
    assert "open" in [step.name for step in conversion.stages]
    assert not [path for path in bundle.iterdir() if path.is_dir()]
    if target == "cpu":  # and again, by itself
        assert isinstance(open_apart(bundle, words), Opened)
        assert isinstance(open_apart(bundle, None), Opened)  # as random weights are


def _settings(bundle: Path) -> None:
    path = bundle / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["of_another_release"] = 1
    write_json(path, config)


def _shorter(bundle: Path) -> None:
    path = bundle / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:4096])


def _fewer_merges(bundle: Path) -> None:
    path = bundle / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]
    write_json(path, tokenizer)


def _another_template(bundle: Path) -> None:
    path = bundle / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "chat_template": config["chat_template"] + "!"})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_settings, "of_another_release"),
        (_shorter, "does not open"),
        (_fewer_merges, "encodes words"),
        (_another_template, "renders one turn, "),
    ],
)
def test_what_no_app_would_open_or_read_right_is_refused_in_a_line(
    exports: Exports, tmp_path: Path, spoil: Callable[[Path], None], said: str, words: Words
) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    spoil(bundle)
    with pytest.raises(BundleError, match=said) as caught:
        open_apart(bundle, words)
    assert "\n" not in str(caught.value)


def test_what_was_known_to_differ_is_no_surprise(exports: Exports, tmp_path: Path, words: Words) -> None:
    bundle = exports.copy(tmp_path / "b", "cpu")
    _another_template(bundle)
    with pytest.raises(BundleError) as caught:
        open_apart(bundle, words)
    named = str(caught.value).partition("renders ")[2].partition(" otherwise")[0].split(", ")
    opens._check_words(_tokenizer(bundle), Words(words.tokenizer_file, (), words.template, _probes(named)))
    with pytest.raises(BundleError, match="renders one turn otherwise"):
        known = tuple(name for name in _probes(named) if name != "one turn")
        opens._check_words(_tokenizer(bundle), Words(words.tokenizer_file, (), words.template, known))


def _probes(named: list[str]) -> tuple[str, ...]:
    from toolkit.bundle.template_probes import PROBES

    assert "one turn" in named
    return tuple(probe.name for probe in PROBES)


def _tokenizer(bundle: Path) -> object:
    import onnxruntime_genai as og

    return og.Tokenizer(og.Model(str(bundle)))


def test_without_genai_the_report_says_so(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    made = opens._open({"bundle": str(exports("cpu"))})
    assert made == {"not_tried": "onnxruntime-genai is not installed: pip install onnxruntime-genai"}
    monkeypatch.setattr(opens, "run_apart", lambda *_, **__: made)
    said = open_apart(exports("cpu"), None)
    assert isinstance(said, NotMeasured) and said.name == "conversion.opened"


def test_the_process_that_opens_imports_little() -> None:
    """Every export waits for it: graphs' and quantizers' packages would be most of its time."""
    loaded = "import sys, toolkit.evaluate.opens; print(*{name.split('.')[0] for name in sys.modules})"
    said = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    assert "jinja2" in said
    assert {"numba", "onnx", "onnx_ir", "onnxruntime", "sympy"} & set(said) == set()
