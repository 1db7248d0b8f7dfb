"""What n-gram speculation is worth here: `python -m benchmarks.speculation BUNDLE`.

onnxruntime-genai 0.16 and later guess the next tokens from n-grams of the text so far and check several guesses in one
run, if the graph gives logits of more than the last position. Bundles give that one alone, so a copy is made whose head
reads the last 17 and pads them with zeros in front to the length that onnxruntime-genai expects. Each prompt is
continued greedily by both; the table has, by guesses a run, how many continuations are the same, tokens a run of the
graph, and tokens/s beside plain decoding.

The prompts are a task's questions (`--task`, JSON lines of `prompt`), in the bundle's own chat template.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime_genai as og
from onnx import TensorProto, helper, numpy_helper

from toolkit import names
from toolkit.bundle.settings import read_settings
from toolkit.evaluate.linked import linked_copy
from toolkit.evaluate.text_model import TextModel

ROOT: Final = Path(__file__).resolve().parent.parent
# The most guesses that onnxruntime-genai takes, and the token they follow.
_ROWS: Final = 17
# Logits of every position of a chunk are a buffer of their own: 622 MB of 1,024 tokens of Qwen's vocabulary.
_CHUNK: Final = 128
# Runs of the graph, by onnxruntime-genai's own count.
_RUNS: Final = ("target_forward_passes", "standard_fallback_steps")
_HEADS: Final = ("guesses", "same answers", "tokens a run", "tokens/s", "plain tokens/s")


def with_rows(bundle: Path) -> tempfile.TemporaryDirectory[str]:
    """A copy of a one-graph bundle for the CPU whose logits are [B, S, V], zeros but for the last 17 positions."""
    copy = linked_copy(bundle, read_settings(bundle), within=ROOT / "build")
    path = Path(copy.name) / names.stage_file(names.MODEL)
    model = onnx.load(path, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    hidden = nodes[names.LAST_POSITION_GATHER].input[0]
    last = nodes[names.LAST_POSITION_UNSQUEEZE].output[0]
    cut = {
        "rows.starts": [-_ROWS],
        "rows.ends": [2**31 - 1],
        "rows.axes": [1],
        "rows.zeros": [0, 0],
        "rows.pads": [0] * 4,
    }
    for name, numbers in cut.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    given = [hidden, "rows.starts", "rows.ends", "rows.axes"]
    kept = [
        node
        for node in model.graph.node
        if node.name not in (names.LAST_POSITION_GATHER, names.LAST_POSITION_UNSQUEEZE)
    ]
    for node in kept:
        node.output[:] = ["rows.logits" if name == names.LOGITS else name for name in node.output]
    head = next(k for k, node in enumerate(kept) if last in node.input)
    padded = [
        helper.make_node("Shape", [hidden], ["rows.length"], start=1, end=2),
        helper.make_node("Shape", ["rows.logits"], ["rows.made"], start=1, end=2),
        helper.make_node("Sub", ["rows.length", "rows.made"], ["rows.missing"]),
        helper.make_node("Concat", ["rows.zero", "rows.missing", "rows.pads"], ["rows.all"], axis=0),
        helper.make_node("Pad", ["rows.logits", "rows.all"], [names.LOGITS]),
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "rows.zero"))
    del model.graph.node[:]
    slice_node = helper.make_node("Slice", given, [last])
    model.graph.node.extend([*kept[:head], slice_node, *kept[head:], *padded])
    logits = next(value for value in model.graph.output if value.name == names.LOGITS)
    logits.type.tensor_type.shape.dim[1].Clear()
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence"
    assert logits.type.tensor_type.elem_type == TensorProto.FLOAT
    path.unlink()
    onnx.save(model, path)
    return copy


def continued(model: Any, prompts: Sequence[Any], new_tokens: int, guesses: int) -> tuple[list[list[int]], int, float]:
    """The greedy continuation of each prompt, with the runs of the graph after the prompt by
    onnxruntime-genai's own count, and the seconds of all; 0 guesses is plain decoding, which counts none."""
    made, runs, seconds = [], 0, 0.0
    for prompt in prompts:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + new_tokens)
        if guesses:
            params.set_speculative_options(max_draft_tokens=guesses, ngram_size=3)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        begun = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        stats = generator.get_speculative_stats() if guesses else {}
        runs += sum(int(stats[kind]) for kind in _RUNS) if guesses else 0
        seconds += time.perf_counter() - begun
        made.append([int(token) for token in generator.get_sequence(0)[len(prompt) :]])
    return made, runs, seconds


def main() -> None:
    """Prints a row for each number of guesses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", type=Path, default=ROOT / "models" / "tiny-r1" / "arithmetic.jsonl")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--guesses", nargs="+", type=int, default=[1, 2, 4, 8])
    asked = parser.parse_args()
    lines = asked.task.read_text(encoding="utf-8").splitlines()[: asked.prompts]
    plain = TextModel(asked.bundle)
    questions = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    prompts = [plain.template.tokenizer.encode(plain.template.render(question)) for question in questions]
    expected, _, plain_s = continued(og.Model(str(asked.bundle)), prompts, asked.new_tokens, 0)
    tokens = sum(map(len, expected))
    print("| " + " | ".join(_HEADS) + " |\n|---|---|---|---|---|", flush=True)
    with with_rows(asked.bundle) as folder:
        config = og.Config(folder)
        config.overlay(json.dumps({"search": {"chunk_size": _CHUNK}}))
        model = og.Model(config)
        for guesses in asked.guesses:
            made, runs, seconds = continued(model, prompts, asked.new_tokens, guesses)
            same = sum(a == b for a, b in zip(expected, made, strict=True))
            row = (
                f"{same} of {len(made)}",
                f"{tokens / runs:.2f}",
                f"{tokens / seconds:.0f}",
                f"{tokens / plain_s:.0f}",
            )
            print(f"| {guesses} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
