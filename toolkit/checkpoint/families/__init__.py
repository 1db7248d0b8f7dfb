"""The model families there are, one file each: a file's `FAMILY` is what its model_type means.

docs/how-to/family.md says how to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from toolkit.checkpoint.family import Family


def _families() -> dict[str, Family]:
    """Returns the family of every file in this folder by its model_type, in the order of the files' names."""
    modules = [importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__)]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(_families())
