"""Everything a user can be told went wrong.

ToolkitError                 exit code 2: the request or its input is bad, or the machine lacks something
├── RecipeError              a recipe is missing, malformed, or asks for what does not exist
├── CheckpointError          a checkpoint is incomplete, corrupt, hostile, or not what the recipe names
│   └── NonFiniteError       a tensor holds NaN or infinity
├── UnsupportedError         a sound request for something this toolkit or target cannot do
├── MachineError             too little disk or memory, or a package is not installed
└── BundleError              a folder is not a bundle, or is not the bundle its manifest says

Each message is one line: what was found, what was expected, what to do.
"""

from __future__ import annotations


class ToolkitError(Exception):
    """The root of the tree; the command line prints it as `error: …` and exits with 2."""


class RecipeError(ToolkitError):
    """A recipe is missing, malformed, or asks for what does not exist."""


class CheckpointError(ToolkitError):
    """A checkpoint is incomplete, corrupt, hostile, or not what the recipe names."""


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity; the message names the tensor and the count."""


class UnsupportedError(ToolkitError):
    """A sound request for something this toolkit or target cannot do."""


class MachineError(ToolkitError):
    """Too little disk or memory, or a package is not installed."""


class BundleError(ToolkitError):
    """A folder is not a bundle, or is not the bundle its manifest says."""
