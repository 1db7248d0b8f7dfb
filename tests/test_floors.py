"""What holds of the package's source as a whole: imports go down only and in no circle, third-party packages stay in
their rooms, and files, functions, dictionaries, docstrings and class names keep their bounds."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Final

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up, one floor a line: a module imports from lower floors and from its own room. A room is a module or
# a folder of the package; rooms on one floor do not import each other. To add a room, name it on a line (or on a new
# line between two) above everything it imports.
FLOORS: Final = (
    (
        "algorithms",
        "errors",
        "figures",
        "machine",
        "names",
        "progress",
        "quality",
        "soc",
        "speculation",
        "thresholds",
        "typed_json",
    ),
    ("device", "files", "jit", "target_rules"),
    ("apart", "workers"),
    ("target",),
    ("recipe",),
    ("checkpoint",),
    ("quant",),
    ("graph", "reference", "trace"),
    ("calibrate",),
    ("partition",),
    ("bundle", "epcontext"),
    ("report",),
    ("evaluate", "hosts"),
    ("pipeline",),
    ("library",),
    ("matrix", "serve"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
# Each package that is not of the standard library, and the rooms that may import it.
DEPENDENCIES: Final[dict[str, set[str]]] = {
    "click": {"cli"},
    "dask": {"workers"},
    "distributed": {"workers"},
    "filelock": {"pipeline"},
    "fsspec": {"checkpoint"},
    "gguf": {"checkpoint"},
    "huggingface_hub": {"checkpoint"},
    "jinja2": {"bundle", "report"},
    "lm_eval": {"evaluate"},
    "numba": {"jit"},
    "onnx": {"epcontext", "evaluate", "graph"},
    "onnx_ir": {"graph", "trace"},
    "onnxruntime": {"epcontext", "evaluate"},
    "onnxruntime_genai": {"evaluate"},
    "onnxruntime_qnn": {"epcontext"},
    "openvino": {"evaluate"},
    "psutil": {"machine"},
    "rich": {"progress"},
    "starlette": {"serve"},
    "tokenizers": {"pipeline", "evaluate"},
    "torch": {"device", "trace"},
    "transformers": {"trace"},
    "uvicorn": {"serve"},
    "yaml": {"recipe"},
}
EVERYWHERE: Final = {"numpy"}

MAX_FILE_LINES: Final = 400
MAX_FUNCTION_LINES: Final = 60
MIN_DOCSTRING_WORDS: Final = 6
MAX_FMT_SKIPS: Final = 3
# Dictionaries of anything, `JsonObject` among them, which is one of them by another name.
MAX_ANY_PER_1000_LINES: Final = 1.5
# Rooms that read or write JSON objects which are not theirs to define: genai_config.json and recipes.
JSON_ROOMS: Final = {"bundle", "recipe", "typed_json"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Sources = dict[str, str]


@pytest.fixture(scope="module")
def sources() -> Sources:
    """Each module's text by its path in the package, with forward slashes."""
    package = ROOT / "toolkit"
    return {p.relative_to(package).as_posix(): p.read_text(encoding="utf-8") for p in sorted(package.rglob("*.py"))}


def module_name(path: str) -> str:
    """`toolkit.graph.rope` of `graph/rope.py`, `toolkit.graph` of `graph/__init__.py`."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(("toolkit", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def room_of(path: str) -> str:
    """The module or folder of the package that a file belongs to."""
    return PurePosixPath(path).parts[0].removesuffix(".py")


@cache
def imported(path: str, text: str) -> tuple[str, ...]:
    """The dotted name of everything a module imports, wherever it does so: at its top, in functions, for types alone,
    relatively, or by `import_module` of a constant."""
    return tuple(_imported(path, text))


def _imported(path: str, text: str) -> Iterator[str]:
    package = ("toolkit", *PurePosixPath(path).parts[:-1])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*above, *([node.module] if node.module else [])))
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value


def imported_room(name: str) -> str | None:
    """The room of a dotted name of the package, None of another package's: what the package itself offers is of
    `__init__`."""
    parts = name.split(".")
    if parts[0] != "toolkit":
        return None
    rooms = {room for floor in FLOORS for room in floor}
    return parts[1] if len(parts) > 1 and parts[1] in rooms else "__init__"


def breaches(sources: Sources) -> list[str]:
    """`path: import` for each import that goes up, sideways, or brings a package into a room that may not have it."""
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    found = []
    for path, text in sources.items():
        room = room_of(path)
        for name in imported(path, text):
            inside, package = imported_room(name), name.split(".")[0]
            if inside is not None:
                wrong = inside != room and floor_of[inside] >= floor_of.get(room, -1)
            elif package in sys.stdlib_module_names or package in EVERYWHERE:
                wrong = False
            else:
                wrong = room not in DEPENDENCIES.get(package, set())
            if wrong:
                found.append(f"{path}: {name}")
    return found


def circles(sources: Sources) -> list[str]:
    """The modules that import each other in the end, each circle once, sorted."""
    modules = {module_name(path) for path in sources}
    edges = {module_name(path): set(_modules_of(imported(path, text), modules)) for path, text in sources.items()}
    reached: dict[str, set[str]] = {}
    for module in modules:
        seen, todo = set[str](), [*edges[module]]
        while todo:
            if (following := todo.pop()) not in seen:
                seen.add(following)
                todo += edges[following]
        reached[module] = seen
    together = {frozenset(m for m in reached[module] if module in reached[m]) for module in modules}
    return sorted(" ".join(sorted(circle)) for circle in together if circle)


def _modules_of(names: Iterable[str], modules: set[str]) -> Iterator[str]:
    """The module each imported name is or comes from."""
    for name in names:
        origin = name.rpartition(".")[0]
        if name in modules or origin in modules:
            yield name if name in modules else origin


def functions(sources: Sources) -> Iterator[tuple[str, Function]]:
    """`path:line name` and the node of every function and method."""
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                yield f"{path}:{node.lineno} {node.name}", node


def poor_docstrings(sources: Sources) -> list[str]:
    """`path:line name` of each module, public class, function and method, those of private classes too, without a
    docstring or with a fragment of fewer words than a sentence has. An empty `__init__.py` needs none."""
    found = []
    for path, text in sources.items():
        tree = ast.parse(text)
        for node in [tree, *_public(tree)] if text.strip() else []:
            first = (ast.get_docstring(node) or "").split("\n\n")[0]
            if len(first.split()) < MIN_DOCSTRING_WORDS:
                where = path if isinstance(node, ast.Module) else f"{path}:{node.lineno} {node.name}"
                found.append(f"{where}: {first!r}")
    return found


def _public(node: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | Function]:
    for child in node.body:
        if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
            yield child
        if isinstance(child, ast.ClassDef):
            yield from _public(child)


def any_per_1000_lines(sources: Sources) -> float:
    """How many `dict[str, Any]`, `dict[str, object]` or `JsonObject` a thousand lines have."""
    text = "".join(sources.values())
    found = re.findall(r"[Dd]ict\[str, (?:Any|object)\]|\bJsonObject\b", text)
    return 1000 * len(found) / max(text.count("\n"), 1)


def duplicate_classes(sources: Sources) -> set[str]:
    """The names that more than one public class has."""
    nodes = (node for text in sources.values() for node in ast.walk(ast.parse(text)))
    names = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))
    return {name for name, times in names.items() if times > 1}


def test_every_module_is_on_one_floor(sources: Sources) -> None:
    listed = [room for floor in FLOORS for room in floor]
    assert sorted(listed) == sorted({room_of(path) for path in sources})


def test_imports_go_down_only(sources: Sources) -> None:
    assert breaches(sources) == []


def test_no_modules_import_each_other(sources: Sources) -> None:
    assert circles(sources) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("graph/x.py", "from toolkit.reference import decoder"),
        ("graph/x.py", "from toolkit import reference"),
        ("graph/x.py", "import toolkit.pipeline.plan"),
        ("graph/x.py", "from ..reference import decoder"),
        ("graph/x.py", "from ..reference.decoder import Decoder"),
        ("graph/x.py", "from .. import reference"),
        ("graph/deeper/x.py", "from ...reference import decoder"),
        ("graph/x.py", "from toolkit import export"),
        ("graph/x.py", "import toolkit"),
        ("graph/x.py", "import torch"),
        ("graph/x.py", "import click.testing"),
        ("graph/x.py", "def f():\n    from toolkit.cli import commands"),
        ("graph/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toolkit.cli import commands"),
        ("graph/x.py", "import importlib\nimportlib.import_module('toolkit.evaluate.session')"),
        ("errors.py", "from toolkit.pipeline import export"),
        ("errors.py", "from .pipeline import export"),
        ("errors.py", "from . import pipeline"),
        ("errors.py", "from toolkit import names"),
        ("soc.py", "from toolkit.target import TARGETS"),
        ("unheard_of.py", "from toolkit import errors"),
        ("reference/__init__.py", "from ..graph import rope"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_seen(path: str, text: str) -> None:
    assert len(breaches({path: text})) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("graph/x.py", "from . import rope\nfrom .rope import tables\nfrom ..checkpoint import config"),
        ("graph/x.py", "import json\nimport numpy as np\nimport onnx_ir as ir\nfrom toolkit import names"),
        ("graph/__init__.py", "from .rope import tables"),
        ("target.py", "from toolkit.soc import SOCS\nfrom . import names"),
        ("cli/x.py", "import toolkit\nfrom toolkit import export\nfrom toolkit.pipeline import plan"),
    ],
)
def test_an_import_that_goes_down_is_not_a_breach(path: str, text: str) -> None:
    assert breaches({path: text}) == []


def test_a_circle_is_seen_even_through_a_function() -> None:
    sources = {
        "a/x.py": "from toolkit.a.y import f",
        "a/y.py": "from . import z",
        "a/z.py": "def f():\n    from .x import g",
        "a/w.py": "from .x import g",
    }
    assert circles(sources) == ["toolkit.a.x toolkit.a.y toolkit.a.z"]


def floors_in(page: str) -> list[tuple[set[str], set[str]]]:
    """The rooms of each floor and the packages that it may import, as the table of a page has them, from the ground
    up: `| floor | room | what lives there | its dependency |`."""
    rows = [line.strip().strip("|").split("|") for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0]) for row in rows] == list(range(len(rows)))
    spoken = [re.sub(r"\([^)]*\)", "", row[3]).replace("-", "_") for row in rows]
    packages = [{name.strip() for name in names.split(",") if name.strip()} for names in spoken]
    return [(set(re.findall(r"`(\w+)/?`", row[1])), used) for row, used in zip(rows, packages, strict=True)]


def test_the_table_of_design_is_the_floors() -> None:
    """Rooms without a name of their own, `__init__` and `__main__`, stand on no floor of the page."""
    assert floors_in("| 0 | `a`, `b/` | x | c-d, e (`b`) |\n| 1 | `f` | x | |\n") == [
        ({"a", "b"}, {"c_d", "e"}),
        ({"f"}, set()),
    ]
    named = [{room for room in floor if not room.startswith("__")} for floor in FLOORS]
    expected = [
        (rooms, {package for package, allowed in DEPENDENCIES.items() if allowed & rooms}) for rooms in named if rooms
    ]
    assert floors_in((ROOT / "DESIGN.md").read_text(encoding="utf-8")) == expected


def test_files_and_functions_are_short(sources: Sources) -> None:
    files = {path: text.count("\n") for path, text in sources.items()}
    assert {path: lines for path, lines in files.items() if lines > MAX_FILE_LINES} == {}
    lengths = {where: node.end_lineno - node.lineno + 1 for where, node in functions(sources) if node.end_lineno}
    assert len(lengths) > 500
    assert {where: lines for where, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def test_dictionaries_of_anything_are_few_and_where_json_is_read_or_written(sources: Sources) -> None:
    text = "a: dict[str, Any]\nb: dict[str, object]\nc: dict[str, int]\nd: JsonObject\ne: MyJsonObject\n\n"
    assert any_per_1000_lines({"x.py": text}) == 500
    assert any_per_1000_lines(sources) <= MAX_ANY_PER_1000_LINES
    assert {room_of(path) for path, text in sources.items() if re.search(r"\bJsonObject\b", text)} == JSON_ROOMS


def test_public_names_have_docstrings_that_are_sentences(sources: Sources) -> None:
    text = '"""A module that says what it is for."""\nclass A:\n    """Too few words."""\n    def f(self): ...\n'
    private = "    def _g(self): ...\nclass _B:\n    def i(self): ...\ndef _h(): ...\n"
    assert poor_docstrings({"x.py": text + private, "__init__.py": ""}) == [
        "x.py:2 A: 'Too few words.'",
        "x.py:4 f: ''",
        "x.py:7 i: ''",
    ]
    assert poor_docstrings(sources) == []


def test_a_class_name_means_one_class(sources: Sources) -> None:
    assert duplicate_classes({"x.py": "class A: ...\nclass B: ...\n", "y.py": "class A: ...\nclass _B: ...\n"}) == {"A"}
    assert duplicate_classes(sources) == set()


def test_the_formatter_is_hardly_ever_switched_off() -> None:
    files = [p for name in ("toolkit", "tests", "benchmarks") for p in sorted((ROOT / name).rglob("*.py"))]
    switch = "# fmt: " + "skip"
    assert len(files) > 100
    assert sum(path.read_text(encoding="utf-8").count(switch) for path in files) <= MAX_FMT_SKIPS


def imports_of_tests(sources: Sources) -> list[str]:
    """`path: import` for each import from a test file: what several of them need stands in a module of its own."""
    return [
        f"{path}: {name}"
        for path, text in sources.items()
        for name in imported(path, text)
        if re.match(r"tests\.(slow\.)?test_", name)
    ]


def test_no_test_file_imports_another() -> None:
    assert len(imports_of_tests({"tests/x.py": "from tests.test_y import run\nfrom tests.slow import test_z\n"})) == 2
    assert imports_of_tests({"tests/x.py": "from tests.graphs import write_graphs\nimport tests.conftest\n"}) == []
    folder = ROOT / "tests"
    files = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.py"))}
    assert imports_of_tests(files) == []
