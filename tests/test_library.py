"""`import toolkit` as a program uses it: which names there are, how fast it comes, and each verb once on tiny-r1."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = [
    "Answer",
    "BundleError",
    "BundleFacts",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFacts",
    "Conversation",
    "Effort",
    "ExportPlan",
    "MachineError",
    "NonFiniteError",
    "Piece",
    "Recipe",
    "RecipeError",
    "Report",
    "ToolkitError",
    "UnsupportedError",
    "bench",
    "check",
    "compare",
    "compile",
    "doctor",
    "export",
    "generate",
    "get",
    "inspect",
    "install",
    "load_recipe",
    "open_checkpoint",
    "plan",
    "recipes",
    "uninstall",
    "validate",
    "verify",
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("library") / "tiny"
    plans = toolkit.plan("tiny-r1-cpu", quality="fast", out=out)
    assert not out.exists()
    assert toolkit.export(plans) == [out]
    return out


def test_the_public_names_are_these_and_each_is_there() -> None:
    """A name that goes, or comes, is a change that users see: it belongs into the changelog."""
    assert sorted(toolkit.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(toolkit))
    for name in PUBLIC:
        assert getattr(toolkit, name).__doc__.strip(), name
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        _ = toolkit.exprot


def test_type_checkers_see_what_python_sees() -> None:
    tree = ast.parse(Path(toolkit.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(str(name) for name in seen) == PUBLIC
    for name, (module, inside) in seen.items():
        found = getattr(toolkit, str(name))
        assert inside == name == found.__name__ and module == found.__module__


def test_the_import_is_lazy_and_quick() -> None:
    code = (
        "import sys, time; begin = time.perf_counter(); import toolkit; took = time.perf_counter() - begin\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'click', 'yaml', 'rich'} & set(sys.modules)\n"
        "print(took, sorted(heavy))\n"
        "toolkit.ToolkitError; print(sorted({'numpy', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    first, second = done.stdout.splitlines()
    took, _, heavy = first.partition(" ")
    assert heavy == "[]" and second == "[]"
    assert float(took) < 0.5  # 0.1 on a quiet machine


def test_a_verb_waits_for_no_import_that_it_does_not_need(bundle: Path) -> None:
    """What compiles loops and what reads graphs takes a second together, which a look or an answer needs not."""
    code = (
        "import sys, toolkit; bundle, checkpoint = sys.argv[1:]\n"
        "def heavy(): print(*sorted({'numba', 'onnx_ir', 'onnxruntime', 'tokenizers', 'jinja2'} & set(sys.modules)))\n"
        "assert toolkit.verify(bundle) == [] and toolkit.inspect(checkpoint).dtypes; heavy()\n"
        "toolkit.generate(bundle, 'Add 4 and 5.', 2); print({'numba', 'onnx_ir', 'jinja2'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(bundle), str(ROOT / "models" / "tiny-r1")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout.splitlines() == ["", "set()"], done.stdout + done.stderr


def test_wheels_tell_type_checkers() -> None:
    assert (Path(toolkit.__file__).parent / "py.typed").is_file()


def test_a_plan_says_what_an_export_makes(bundle: Path) -> None:
    (plan,) = toolkit.plan("tiny-r1-cpu", quality="fast", out=bundle)
    assert isinstance(plan, toolkit.ExportPlan)
    assert (bundle / "model.onnx.data").stat().st_size == pytest.approx(plan.files["model.onnx.data"], rel=0.1)
    recipe, (own,) = toolkit.load_recipe("tiny-r1-cpu"), toolkit.plan("tiny-r1-cpu")
    assert isinstance(recipe, toolkit.Recipe) and recipe.quality == own.recipe.quality == "balanced"
    (fast,) = toolkit.plan("tiny-r1-cpu", synthetic=True)
    assert fast.recipe.quality == "fast" and fast.opened.synthetic
    (best,) = toolkit.plan("tiny-r1-cpu", quality="best", changes=["context_length=512"])
    assert best.recipe.quality == "best" and best.recipe.context_length == 512


def test_one_question_has_thought_and_answer_apart(bundle: Path) -> None:
    answer = toolkit.generate(bundle, "Add 4 and 5.", 200)
    assert answer.text.endswith("9") and answer.thought and "</think>" not in answer.thought + answer.text
    assert answer.finish_reason == "stop" and answer.new_tokens > 10 and answer.prompt_tokens > 3
    assert answer.ttft_s > 0 and answer.decode_tokens_per_s is not None and answer.decode_tokens_per_s > 1
    cut = toolkit.generate(bundle, "Add 4 and 5.", 5)
    assert cut.finish_reason == "length" and cut.new_tokens == 5 and cut.text == ""


def test_an_answer_that_was_cut_does_not_enter_the_conversation(bundle: Path) -> None:
    short, whole = toolkit.Conversation(bundle, 5), toolkit.Conversation(bundle, 200)
    assert list(short.ask("Add 4 and 5."))
    first = short.answer
    assert first.finish_reason == "length"
    # Asked again, the prompt is as long as the first: nothing of the cut turn is in it.
    list(short.ask("Add 4 and 5."))
    assert short.answer.prompt_tokens == first.prompt_tokens
    list(whole.ask("Add 4 and 5."))
    list(whole.ask("Add 4 and 5."))
    assert whole.answer.prompt_tokens > first.prompt_tokens


def test_validate_check_verify_and_inspect(bundle: Path) -> None:
    effort = toolkit.Effort(tokens=64, tasks=False, speed=False, baseline=False)
    report = toolkit.validate(bundle, effort=effort)
    assert report.parity is not None and report.parity.tokens >= 64
    assert report.verdict is not None and report.verdict.passed
    assert toolkit.check(bundle).passed and toolkit.verify(bundle) == []
    made, read = toolkit.inspect(bundle), toolkit.inspect(ROOT / "models" / "tiny-r1")
    assert isinstance(made, toolkit.BundleFacts) and isinstance(read, toolkit.CheckpointFacts)
    assert made.manifest.recipe.name == "tiny-r1-cpu" and made.operators["GroupQueryAttention"] == 4
    assert read.config.model_type == "qwen2" and read.parameters == 3_674_368 and read.dtypes == {"BF16": 51}
    speed = toolkit.bench(bundle, prompt_tokens=8, new_tokens=4, repeat=1)
    assert speed.decode_tokens_per_s > 0
    with pytest.raises(toolkit.UnsupportedError, match="no ahead-of-time compiler"):
        toolkit.compile(bundle)


def test_errors_are_the_toolkits_own(tmp_path: Path) -> None:
    with pytest.raises(toolkit.CheckpointError, match="neither a folder"):
        toolkit.open_checkpoint(str(tmp_path / "nothing" / "here" / "at-all"))
    with pytest.raises(toolkit.RecipeError, match="no recipe is named"):
        toolkit.plan()
    with pytest.raises(toolkit.ToolkitError, match="reads one checkpoint"):
        toolkit.plan("1.5b-cpu", "14b-cpu", shapes_alone=True)
    with pytest.raises(toolkit.BundleError):
        toolkit.validate(tmp_path)
    assert toolkit.open_checkpoint("tiny-r1").config.hidden_size > 0


def test_the_catalogue_has_rows() -> None:
    rows = {row.recipe: row for row in toolkit.recipes()}
    assert rows["tiny-r1-cpu"].target == "cpu" and rows["tiny-r1-cpu"].bundle_bytes > 1 << 20
