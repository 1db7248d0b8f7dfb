"""A decoder of any family as torch's exporter writes it: the graph without weights, and what these are called.

transformers knows how the family computes, so nothing here does; torch and transformers run in a child (`child.py`).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit.apart import ChildFailed, run_apart
from toolkit.errors import MachineError, UnsupportedError
from toolkit.typed_json import from_json

PACKAGES: Final = ("torch", "transformers", "onnxscript")
# What the child says of a family that keeps no key and value of each token.
CACHE_LESS: Final = "it keeps no keys and values of earlier tokens, one pair a layer"


@dataclass(frozen=True)
class TraceJob:
    """The folder with a checkpoint's config.json, and the file that the graph goes into."""

    folder: str
    graph: str


@dataclass(frozen=True)
class TracedFacts:
    """The shape of each tensor of the checkpoint that the graph reads, by the name it has in the module and as an
    initializer; `aliases` are other names that a checkpoint may have it under."""

    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, tuple[str, ...]]


def check_packages() -> None:
    """Raises MachineError unless what traces a model is installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise MachineError(f"--trace needs {' and '.join(missing)}: pip install onnx-distill-toolkit[trace]")


def trace_decoder(folder: Path, graph: Path, model_type: str) -> TracedFacts:
    """Writes the graph of the decoder that a folder's config.json means to the file `graph`, no weights in it, and
    returns what it reads.

    Raises MachineError where a package is missing, UnsupportedError for a model that torch cannot trace or that
    onnxruntime-genai could not run.
    """
    check_packages()
    try:
        made = run_apart("toolkit.trace.child", TraceJob(str(folder.resolve()), str(graph)))
    except ChildFailed as problem:
        if CACHE_LESS in problem.reason:
            raise UnsupportedError(
                f"model_type {model_type!r} cannot run in onnxruntime-genai: {CACHE_LESS}: expected a decoder of text "
                "that attends to them"
            ) from None
        raise UnsupportedError(f"model_type {model_type!r} cannot be traced: {problem.reason}") from None
    return from_json(TracedFacts, made, "the traced decoder")
