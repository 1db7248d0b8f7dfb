"""How much memory a bundle's KV cache takes: onnxruntime-genai allocates it whole before the first token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.settings import Settings
from toolkit.errors import BundleError
from toolkit.graph.interface import read_interface

_ITEM_BYTES: Final = {"FLOAT": 4, "FLOAT16": 2, "UINT8": 1}


def cache_bytes(bundle: Path, settings: Settings, length: int) -> int:
    """Returns the bytes of a cache for `length` tokens, or for as many as the graph fixes; 0 if no graph has one.

    Raises BundleError for a cache of a dtype that onnxruntime-genai does not have.
    """
    for stage in settings.stages:
        path = bundle / stage.filename
        if not path.is_file():
            continue
        inputs = read_interface(path).inputs
        cache = [value for name, value in inputs.items() if names.is_past(name)]
        if odd := {value.dtype for value in cache} - _ITEM_BYTES.keys():
            raise BundleError(f"{path} has a KV cache of {min(odd)}, expected one of {', '.join(_ITEM_BYTES)}")
        if cache:
            shapes = [[length if isinstance(d, str) and k == 2 else d for k, d in enumerate(v.shape)] for v in cache]
            sizes = [math.prod(d for d in shape if isinstance(d, int)) for shape in shapes]
            return sum(size * _ITEM_BYTES[value.dtype] for size, value in zip(sizes, cache, strict=True))
    return 0
