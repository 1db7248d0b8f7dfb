"""What a KV cache of int8 costs and is worth on the CPU: `python -m benchmarks.kv_cache BUNDLE TEXT`.

ONNX Runtime's GroupQueryAttention takes a cache of int8 whose scales, one a channel, stand in the graph. The bundle's
own graph reads the first half of a text (JSON lines with `text`, `prompt` or `question`), which tells how large each
channel gets; a copy of the graph keeps its cache in int8. Both read the other half token by token, activations exact,
as rounding these to int8 makes more of any difference. The table has the divergence between the two, what a token takes
of the cache, and the speeds behind prompts of several lengths, in turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from toolkit import names
from toolkit.bundle.cache import graph_cache_bytes
from toolkit.bundle.settings import read_settings
from toolkit.evaluate.linked import linked_copy
from toolkit.evaluate.positions import OneGraph, empty_cache
from toolkit.evaluate.speed import measure_speed

ROOT: Final = Path(__file__).resolve().parent.parent
_LEVELS: Final = 127
# Where GroupQueryAttention has its scales, behind optional inputs.
_BEFORE_SCALES: Final = 12
_ATTENTION: Final = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
# Read as one prompt, what follows by single tokens.
_PROMPT: Final = 16
Floats = NDArray[np.float32]


def largest(bundle: Path, sequences: Sequence[list[int]]) -> dict[str, Floats]:
    """By the name of a cache's output, the largest magnitude [kv heads * head_dim] of each of its channels."""
    session, found = OneGraph(bundle)._session, dict[str, Floats]()
    wanted = [value.name for value in session.get_outputs() if names.is_present(value.name)]
    for ids in sequences:
        feeds: dict[str, Any] = {
            names.INPUT_IDS: np.array([ids], np.int64),
            names.ATTENTION_MASK: np.ones((1, len(ids)), np.int64),
            **empty_cache(session, 0),
        }
        for name, made in zip(wanted, session.run(wanted, feeds), strict=True):
            peak = np.abs(made).max(axis=(0, 2)).reshape(-1)
            found[name] = np.maximum(found.get(name, peak), peak)
    return found


def with_int8_cache(bundle: Path, peaks: dict[str, Floats]) -> tempfile.TemporaryDirectory[str]:
    """A copy of a bundle for the CPU whose cache is int8, each channel's largest value at 127."""
    copy = linked_copy(bundle, read_settings(bundle), within=ROOT / "build")
    path = Path(copy.name) / names.stage_file(names.MODEL)
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        scales = [f"{name}.scale" for name in node.output[1:3]]
        for name, scale in zip(node.output[1:3], scales, strict=True):
            numbers = np.maximum(peaks[name], 1e-6) / _LEVELS
            model.graph.initializer.append(numpy_helper.from_array(numbers.astype(np.float32), scale))
        node.input.extend([""] * (_BEFORE_SCALES - len(node.input)) + scales)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in _ATTENTION.items())
    for value in (*model.graph.input, *model.graph.output):
        if names.is_past(value.name) or names.is_present(value.name):
            value.type.tensor_type.elem_type = TensorProto.INT8
    path.unlink()
    onnx.save(model, path)
    return copy


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Log-probabilities [T, V] of logits."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    made: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return made


def divergences(bundle: Path, other: Path, sequences: Sequence[list[int]]) -> tuple[NDArray[np.float64], float]:
    """The KLD of each position behind the prompt from one bundle to the other, and how often their first choices
    agree."""
    found, agree = [], []
    ours, theirs = OneGraph(bundle, exact=True), OneGraph(other, exact=True)
    for ids in sequences:
        p, q = (log_softmax(graph.logits(ids, _PROMPT)[_PROMPT:]) for graph in (ours, theirs))
        found.append((np.exp(p) * (p - q)).sum(axis=-1))
        agree.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    return np.concatenate(found), float(np.concatenate(agree).mean())


def sequences_of(path: Path, bundle: Path, count: int, length: int) -> list[list[int]]:
    """The ids of a text's first lines, each cut to `length`."""
    tokenizer = Tokenizer.from_file(str(bundle / names.TOKENIZER_FILE))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[: 4 * count]]
    keys = ("text", "prompt", "question")
    texts = [next(line[key] for key in keys if key in line) + " " + str(line.get("answer", "")) for line in lines]
    joined = [" ".join(texts[k : k + 4]) for k in range(0, len(texts), 4)]
    return [tokenizer.encode(text, add_special_tokens=False).ids[:length] for text in joined]


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--filled", nargs="+", type=int, default=[512, 2048, 4096])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    asked = parser.parse_args()
    read = sequences_of(asked.text, asked.bundle, asked.sequences, asked.length)
    half = len(read) // 2
    with with_int8_cache(asked.bundle, largest(asked.bundle, read[:half])) as name:
        folder = Path(name)
        kld, agree = divergences(asked.bundle, folder, read[half:])
        sizes = [graph_cache_bytes(place / names.stage_file(names.MODEL), 1) for place in (asked.bundle, folder)]
        print(f"mean KLD {kld.mean():.5f}, 99th percentile {np.quantile(kld, 0.99):.5f}, top-1 {agree:.1%}, ", end="")
        print(f"{len(kld)} positions; {sizes[0]} and {sizes[1]} bytes a token", flush=True)
        print("| filled | prefill, float32 | int8 | decode, float32 | int8 |\n|---|---|---|---|---|", flush=True)
        for filled in asked.filled:
            speeds = [measure_speed(place, filled, asked.new_tokens, asked.repeat) for place in (asked.bundle, folder)]
            cells = [f"{speed.prefill_tokens_per_s:.0f}" for speed in speeds]
            cells += [f"{speed.decode_tokens_per_s:.1f}" for speed in speeds]
            print(f"| {filled} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
