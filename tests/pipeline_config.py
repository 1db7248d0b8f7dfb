"""A pipeline's genai_config, reached by paths, and a bundle's copy to edit it in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

ITERATOR = "model.decoder.pipeline.0.iterator"


def setting_at(config: dict[str, Any], path: str) -> Any:
    """What stands at a dotted path, numbers counting in lists."""
    place: Any = config
    for part in path.split("."):
        place = place[int(part)] if isinstance(place, list) else place[part]
    return place


def copy_without_weights(bundle: Path, folder: Path) -> Path:
    """The bundle without its weights, which the linter never reads."""
    folder.mkdir()
    for name in (*(path.name for path in bundle.glob("*.onnx")), "tokenizer.json"):
        os.link(bundle / name, folder / name)
    shutil.copy(bundle / "genai_config.json", folder)
    return folder
