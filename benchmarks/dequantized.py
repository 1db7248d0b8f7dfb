"""A GGUF file as a folder in Hugging Face layout: float16 weights, for tools that read nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.shuffled import Order, shuffled_orders
from toolkit import names
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.checkpoint.weights import expected_tensors
from toolkit.files import replacing

_WEIGHTS = "model.safetensors"
# What onnxruntime-genai's builder goes by, where a GGUF file names no class of transformers.
_CLASSES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def dequantized_folder(path: Path, folder: Path, shuffled: bool = False) -> Checkpoint:
    """The checkpoint of a folder that is written unless it is there: every tensor rounded to float16, its channels in
    another order where it is to be `shuffled`, and the files beside them as the toolkit rebuilds them from the
    metadata. One tensor is in memory at a time."""
    if not (folder / _WEIGHTS).is_file():
        checkpoint = open_checkpoint(path)
        folder.mkdir(parents=True, exist_ok=True)
        for beside in checkpoint.folder.iterdir():
            if beside.is_file():
                shutil.copyfile(beside, folder / beside.name)
        config = json.loads((folder / names.CONFIG_FILE).read_text(encoding="utf-8"))
        config |= {"architectures": [_CLASSES[config["model_type"]]], "torch_dtype": "float16"}
        (folder / names.CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        with replacing(folder / _WEIGHTS) as fresh:
            _write_safetensors(checkpoint, fresh, shuffled_orders(decoder_of(checkpoint.config)) if shuffled else {})
    return open_checkpoint(folder)


def _write_safetensors(checkpoint: Checkpoint, path: Path, orders: Mapping[str, Order]) -> None:
    """The format of huggingface/safetensors: a header's length, the header, the tensors."""
    header, end = dict[str, dict[str, object]](), 0
    for name, shape in expected_tensors(checkpoint.config).items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            values = orders.get(name, Order()).applied(checkpoint.source.read(name))
            file.write(values.astype("<f2").tobytes())
