"""tiny-r1 in a folder of its own, to be changed file by file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import safetensors.torch
import torch

HEAD: Final = "lm_head.weight"
TABLE: Final = "model.embed_tokens.weight"
DOWN: Final = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def copied(tiny_r1: Path, folder: Path) -> Path:
    """The folder with tiny-r1's weights and small files in it."""
    for path in [*tiny_r1.glob("*.json"), tiny_r1 / "model.safetensors"]:
        shutil.copy(path, folder)
    return folder


def tensors_of(folder: Path) -> Tensors:
    """Every tensor of model.safetensors, as torch reads it."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def save_tensors(folder: Path, tensors: Tensors, file: str = "model.safetensors") -> None:
    """Writes tensors to a file of the folder."""
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file)


def set_keys(path: Path, **values: object) -> None:
    """Sets keys of a JSON object in a file, which need not be there."""
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(raw | values, ensure_ascii=False), encoding="utf-8")
