"""How much memory a bundle's KV cache takes: onnxruntime-genai allocates it whole before the first token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.settings import Settings
from toolkit.errors import BundleError
from toolkit.graph.interface import read_inputs

_ITEM_BYTES: Final = {"FLOAT": 4, "FLOAT16": 2, "UINT8": 1, "INT8": 1}


def cache_bytes(bundle: Path, settings: Settings, length: int) -> int:
    """Returns the bytes of a cache for `length` tokens, or for as many as the graph fixes; 0 if no graph has one.

    Raises BundleError for a cache of a dtype that onnxruntime-genai does not have.
    """
    paths = [bundle / stage.filename for stage in settings.stages]
    return next((nbytes for path in paths if path.is_file() and (nbytes := graph_cache_bytes(path, length))), 0)


def graph_cache_bytes(path: Path, length: int) -> int:
    """Returns the same of one graph."""
    cache = [value for name, value in read_inputs(path).items() if names.is_past(name)]
    if odd := {value.dtype for value in cache} - _ITEM_BYTES.keys():
        raise BundleError(f"{path} has a KV cache of {min(odd)}, expected one of {', '.join(_ITEM_BYTES)}")
    shapes = [[length if isinstance(d, str) and k == 2 else d for k, d in enumerate(v.shape)] for v in cache]
    sizes = [math.prod(d for d in shape if isinstance(d, int)) for shape in shapes]
    return sum(size * _ITEM_BYTES[value.dtype] for size, value in zip(sizes, cache, strict=True))
