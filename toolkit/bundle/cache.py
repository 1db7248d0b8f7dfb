"""How much memory a bundle's KV cache takes: onnxruntime-genai allocates it whole before the first token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.genai_config import stage_sections
from toolkit.graph.interface import read_interface
from toolkit.typed_json import JsonObject

_ITEM_BYTES: Final = {"FLOAT": 4, "FLOAT16": 2, "UINT8": 1}


def cache_bytes(bundle: Path, config: JsonObject, length: int) -> int:
    """Of a cache for `length` tokens, or for as many as the graph fixes. 0 if no graph of the bundle has one."""
    for section in stage_sections(config):
        path = bundle / str(section.get("filename"))
        if not path.is_file():
            continue
        inputs = read_interface(path).inputs
        cache = [value for name, value in inputs.items() if name.startswith(names.past_key(0).split(".")[0])]
        if cache:
            shapes = [[length if isinstance(d, str) and k == 2 else d for k, d in enumerate(v.shape)] for v in cache]
            sizes = [math.prod(d for d in shape if isinstance(d, int)) for shape in shapes]
            return sum(size * _ITEM_BYTES[value.dtype] for size, value in zip(sizes, cache, strict=True))
    return 0
