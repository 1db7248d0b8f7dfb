"""What a layer's experts take for one decoded token, beside dense products of as many active bytes.

`python -m benchmarks.expert_speed [MODEL]`: layers of experts in a model's true shapes (models/MODEL/config.json, by
default those of Qwen3-30B-A3B), 4-bit blocks of random levels, as the toolkit writes them for the CPU (QMoE), and MLPs
as wide as the experts of one token are together (MatMulNBits). Both are chains of layers that no processor's cache
holds; each run draws anew which experts are chosen. They run in turns; the table has medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from toolkit import names
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.config import ModelConfig, parse_config
from toolkit.checkpoint.sublayers import Mlp, Moe
from toolkit.graph.builder import GraphBuilder, declare, value
from toolkit.graph.layout import Layout, Slot, plan_layout
from toolkit.recipe import load_recipe
from toolkit.target import CPU_FORM, TARGETS

ROOT: Final = Path(__file__).resolve().parent.parent
_FILE: Final = "chain.onnx"
# bfloat16's bits of .002, which keeps activations near 1 through a chain of layers, and two zero points of 8.
_SCALE: Final = 0x3B03
_ZERO_POINTS: Final = 0x88


@dataclass(frozen=True)
class Chain:
    """Layers behind each other as one session: what a run is fed, how many layers, and the bytes of weights that one
    token meets in each."""

    session: ort.InferenceSession
    feeds: Callable[[np.random.Generator], dict[str, NDArray[np.float32]]]
    layers: int
    active_bytes: int

    def milliseconds(self, random: np.random.Generator, runs: int) -> float:
        """The median time of a layer for one token."""
        times = []
        for _ in range(runs):
            feeds = self.feeds(random)
            begin = time.perf_counter()
            self.session.run(None, feeds)
            times.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(times) / self.layers


def dense_config(config: ModelConfig, layers: int) -> ModelConfig:
    """The config of a dense model whose MLP has the weights of one token's experts."""
    experts = config.structure.experts
    assert experts is not None
    raw = {
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": experts.per_token * experts.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "head_dim": 128,
        "vocab_size": 1024,
    }
    return parse_config(raw, Path("dense"))


def chain(config: ModelConfig, folder: Path, *, routed: bool, threads: int) -> Chain:
    """The second halves of all layers in one graph. Where experts are not `routed` by their own router, a run draws
    the logits."""
    folder.mkdir()
    layout = plan_layout(config, TARGETS["cpu"], load_recipe("cpu", checkpoint="random levels"))
    _fill(layout, folder)
    build, width = GraphBuilder(layout, CPU_FORM), config.hidden_size
    inputs = [value("x", ir.DataType.FLOAT, [1, 1, width])]
    y, active = inputs[0], 0
    for layer in decoder_of(config).layers:
        path, half = f"/layers.{layer.index}", layer.mlp
        if isinstance(half, Moe):
            logits = _logits(build, path, y, half, routed)
            inputs += [logits] if not routed else []
            made = build.experts(path, y, logits, half)
            active = _bytes(layout, (half.gate_up_proj, half.down_proj)) * half.routing.per_token // half.routing.count
        else:
            made = _mlp(build, path, y, half)
            active = _bytes(layout, [linear.module for linear in half.linears])
        (y,) = build.op(f"{path}/Add", [y, made])
    output = declare(y, "y", ir.DataType.FLOAT, [1, 1, width])
    ir.save(build.model("chain", inputs, [output]), folder / _FILE)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(folder / _FILE), options, providers=["CPUExecutionProvider"])
    shapes = {given.name: tuple(given.shape) for given in session.get_inputs()}
    return Chain(
        session,
        lambda random: {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()},
        config.num_hidden_layers,
        active,
    )


def _logits(build: GraphBuilder, path: str, x: ir.Value, moe: Moe, routed: bool) -> ir.Value:
    """The router's logits [1, E], or an input of the graph that takes their place."""
    if not routed:
        return value(f"logits{path}", ir.DataType.FLOAT, [1, moe.routing.count])
    flat = build.constant("flat", np.array([-1, moe.routing.count], np.int64))
    return build.op(f"{path}/Reshape", [build.linear(f"{path}/gate", x, moe.router.module), flat])[0]


def _mlp(build: GraphBuilder, path: str, x: ir.Value, mlp: Mlp) -> ir.Value:
    """The three products of a dense MLP, and what stands between."""
    gate, up = (
        build.linear(f"{path}/{name}", x, linear.module) for name, linear in zip("gu", mlp.linears[:2], strict=True)
    )
    (sigmoid,) = build.op(f"{path}/Sigmoid", [gate])
    (silu,) = build.op(f"{path}/Mul.silu", [gate, sigmoid])
    (product,) = build.op(f"{path}/Mul", [silu, up])
    return build.linear(f"{path}/d", product, mlp.down_proj.module)


def _bytes(layout: Layout, modules: tuple[str, ...] | list[str]) -> int:
    """The bytes of matrices as they are stored."""
    return sum(slot.nbytes for module in modules for slot in layout.units[names.weight(module)].slots)


def _fill(layout: Layout, folder: Path) -> None:
    """Writes data files of the layout's size, of which the second halves of layers alone hold something."""
    levels = np.random.default_rng(0).integers(0, 256, (1 << 20) + 7, np.uint8)
    for name, nbytes in layout.files.items():
        with (folder / name).open("wb") as file:
            file.truncate(nbytes)
            for unit in layout.in_file(name):
                if ".mlp." not in unit.name:
                    continue
                for slot in unit.slots:
                    file.seek(slot.offset)
                    file.write(_content(slot, levels).tobytes())


def _content(slot: Slot, levels: NDArray[np.uint8]) -> NDArray[Any]:
    """The values of one array of a matrix: random levels, one scale, zero points in the middle; small floats."""
    if slot.dtype == "float32":
        return np.random.default_rng(1).standard_normal(slot.shape, np.float32) / np.float32(math.sqrt(slot.shape[-1]))
    if slot.dtype == "bfloat16":
        return np.full(slot.shape, _SCALE, np.uint16)
    if slot.name.endswith(".zero_points"):
        return np.full(slot.shape, _ZERO_POINTS, np.uint8)
    return np.resize(levels, slot.nbytes)


def main() -> None:
    """Prints a row for each chain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=2, help="of experts")
    parser.add_argument("--dense-layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=int, default=20, help="of each chain in a round")
    parser.add_argument("--warm", type=int, default=128, help="runs before, so that every expert was met")
    parser.add_argument("--threads", type=int, default=0, help="0 for ONNX Runtime's choice")
    asked = parser.parse_args()
    path = ROOT / "models" / asked.model / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | {"num_hidden_layers": asked.layers}
    config = parse_config(raw | ({"first_k_dense_replace": 0} if "first_k_dense_replace" in raw else {}), path)
    random = np.random.default_rng(2)
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as name:
        dense = dense_config(config, asked.dense_layers)
        chains = {
            "dense MatMulNBits": chain(dense, Path(name) / "dense", routed=False, threads=asked.threads),
            "QMoE": chain(config, Path(name) / "experts", routed=False, threads=asked.threads),
            "router and QMoE": chain(config, Path(name) / "routed", routed=True, threads=asked.threads),
        }
        for each in chains.values():
            each.milliseconds(random, asked.warm)
        rounds = [
            {key: each.milliseconds(random, asked.runs) for key, each in chains.items()} for _ in range(asked.rounds)
        ]
    print("| | MB a token and layer | ms a layer | rounds from, to | of the dense |\n|---|---|---|---|---|")
    for key, each in chains.items():
        times = sorted(row[key] for row in rounds)
        ratio = statistics.median(row[key] / row["dense MatMulNBits"] for row in rounds)
        spread = f"{times[0]:.3f}, {times[-1]:.3f}"
        print(f"| {key} | {each.active_bytes / 1e6:.1f} | {statistics.median(times):.3f} | {spread} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
