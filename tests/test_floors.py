"""Imports go down only, and heavy dependencies stay in their rooms."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "toolkit"
FLOORS = {
    "errors": 0,
    "names": 0,
    "machine": 0,
    "progress": 0,
    "target": 0,
    "quality": 0,
    "soc": 0,
    "recipe": 1,
    "checkpoint": 2,
    "quant": 3,
    "graph": 4,
    "reference": 4,
    "calibrate": 5,
    "partition": 6,
    "bundle": 7,
    "epcontext": 7,
    "validate": 8,
    "report": 9,
    "pipeline": 10,
    "cli": 11,
    "__main__": 12,
}
ROOMS = {
    "click": {"cli"},
    "numba": {"quant"},
    "rich": {"progress"},
    "jinja2": {"report"},
    "psutil": {"machine"},
    "huggingface_hub": {"checkpoint"},
    "yaml": {"recipe"},
    "onnx_ir": {"graph"},
    "onnx": {"validate", "epcontext"},
    "onnxruntime": {"validate", "epcontext"},
    "onnxruntime_genai": {"validate"},
    "openvino": {"validate"},
    "onnxruntime_qnn": {"epcontext"},
    "tokenizers": {"validate", "pipeline"},
    "lm_eval": {"validate"},
    "torch": set(),
    "transformers": set(),
}


def breaches(sources: dict[str, str]) -> list[str]:
    """`room: import` for each import that goes up, sideways, or outside its room; keys are paths in the package."""
    found = []
    for path, text in sources.items():
        room = Path(path).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(text)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [f"toolkit.{a.name}" for a in node.names] if node.module == "toolkit" else [node.module]
            for module in modules:
                parts = module.split(".")
                inside = parts[0] == "toolkit" and len(parts) > 1 and parts[1] in FLOORS
                if inside and parts[1] != room and FLOORS[parts[1]] >= FLOORS[room] and FLOORS[room]:
                    found.append(f"{room}: {module}")
                if parts[0] in ROOMS and room not in ROOMS[parts[0]]:
                    found.append(f"{room}: {module}")
    return found


def test_imports_go_down_only() -> None:
    files = {str(p.relative_to(PACKAGE)): p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py")}
    assert breaches({k: v for k, v in files.items() if k != "__init__.py"}) == []


def test_a_breach_is_seen() -> None:
    text = "from toolkit.reference import decoder\nimport torch\n"
    assert breaches({"graph/x.py": text}) == ["graph: toolkit.reference", "graph: torch"]
