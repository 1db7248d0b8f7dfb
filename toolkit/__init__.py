"""Turns open reasoning distills into ONNX bundles that onnxruntime-genai opens.

The verbs are functions (`plan`, `export`, `validate`, `check`, `compile`, `generate`, …); what they take and give are
frozen dataclasses. Every name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from toolkit.checkpoint.opened import Checkpoint as Checkpoint
    from toolkit.errors import BundleError as BundleError
    from toolkit.errors import CheckpointError as CheckpointError
    from toolkit.errors import MachineError as MachineError
    from toolkit.errors import NonFiniteError as NonFiniteError
    from toolkit.errors import RecipeError as RecipeError
    from toolkit.errors import ToolkitError as ToolkitError
    from toolkit.errors import UnsupportedError as UnsupportedError
    from toolkit.evaluate.conversation import Answer as Answer
    from toolkit.evaluate.conversation import Conversation as Conversation
    from toolkit.evaluate.thought import Piece as Piece
    from toolkit.library import bench as bench
    from toolkit.library import check as check
    from toolkit.library import compare as compare
    from toolkit.library import compile as compile
    from toolkit.library import doctor as doctor
    from toolkit.library import export as export
    from toolkit.library import generate as generate
    from toolkit.library import get as get
    from toolkit.library import inspect as inspect
    from toolkit.library import install as install
    from toolkit.library import open_checkpoint as open_checkpoint
    from toolkit.library import plan as plan
    from toolkit.library import recipes as recipes
    from toolkit.library import uninstall as uninstall
    from toolkit.library import validate as validate
    from toolkit.library import verify as verify
    from toolkit.pipeline.inspect import BundleFacts as BundleFacts
    from toolkit.pipeline.inspect import CheckpointFacts as CheckpointFacts
    from toolkit.pipeline.judge.effort import Effort as Effort
    from toolkit.pipeline.plan import ExportPlan as ExportPlan
    from toolkit.recipe.read import load_recipe as load_recipe
    from toolkit.recipe.recipe import Recipe as Recipe
    from toolkit.report.sections import Report as Report

__version__ = "0.1.0"

# The module that defines each public name. Type checkers read the imports
# above instead; a test holds the two lists equal.
_PUBLIC: Final = {
    "Answer": "toolkit.evaluate.conversation",
    "BundleError": "toolkit.errors",
    "BundleFacts": "toolkit.pipeline.inspect",
    "Checkpoint": "toolkit.checkpoint.opened",
    "CheckpointError": "toolkit.errors",
    "CheckpointFacts": "toolkit.pipeline.inspect",
    "Conversation": "toolkit.evaluate.conversation",
    "Effort": "toolkit.pipeline.judge.effort",
    "ExportPlan": "toolkit.pipeline.plan",
    "MachineError": "toolkit.errors",
    "NonFiniteError": "toolkit.errors",
    "Piece": "toolkit.evaluate.thought",
    "Recipe": "toolkit.recipe.recipe",
    "RecipeError": "toolkit.errors",
    "Report": "toolkit.report.sections",
    "ToolkitError": "toolkit.errors",
    "UnsupportedError": "toolkit.errors",
    "bench": "toolkit.library",
    "check": "toolkit.library",
    "compare": "toolkit.library",
    "compile": "toolkit.library",
    "doctor": "toolkit.library",
    "export": "toolkit.library",
    "generate": "toolkit.library",
    "get": "toolkit.library",
    "inspect": "toolkit.library",
    "install": "toolkit.library",
    "load_recipe": "toolkit.recipe.read",
    "open_checkpoint": "toolkit.library",
    "plan": "toolkit.library",
    "recipes": "toolkit.library",
    "uninstall": "toolkit.library",
    "validate": "toolkit.library",
    "verify": "toolkit.library",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    """A public name, its module imported now."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    found: object = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted([*globals(), *_PUBLIC])
