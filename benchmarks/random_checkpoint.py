"""A random bf16 checkpoint of the 1.5B's true shape, for timing an export: random_checkpoint.py FOLDER (3.6 GB)."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

from toolkit.checkpoint.config import parse_config
from toolkit.checkpoint.weights import expected_tensors

CONFIG = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 151646, "eos_token_id": 151643,
}  # fmt: skip


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    for path in (Path(__file__).resolve().parent.parent / "models" / "tiny-r1").glob("tokenizer*.json"):
        shutil.copy(path, folder)  # any tokenizer does: token ids are fed, no text
    header, end = {}, 0
    shapes = expected_tensors(parse_config(CONFIG, folder))
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    generator = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            rows, width = shape if len(shape) == 2 else (1, shape[0])
            for start in range(0, rows, 4096):
                count = (min(rows, start + 4096) - start, width)
                values = np.float32(1) + np.zeros(count, np.float32)
                if len(shape) == 2:
                    values = generator.standard_normal(count, np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
