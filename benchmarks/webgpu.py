"""What a GPU makes of the target webgpu, in a few minutes: `python -m benchmarks.webgpu`.

Wants `pip install .[convert,webgpu]` and a GPU with a driver for Vulkan, Direct3D 12 or Metal. tiny-r1 first: `toolkit
check --run`, and how many of its greedy tokens are the CPU's. Then shapes of the distills with random weights, head on
the GPU and on the CPU, and once more without rounding the products' input to int8: what that kernel is worth.
The table has prefill and decode in tokens/s, medians of three runs, and the tokens that agree with the CPU's.

`--llama-bench PROGRAM` runs that build of llama.cpp beside each, on a file of the same shape in its Q4_0
(`pip install gguf`). `--toy` takes tiny-r1 alone, and a few tokens: seconds on any device.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Final

import onnx

import toolkit
from benchmarks.device import print_row, said
from benchmarks.peers.gguf_file import write_random_gguf
from benchmarks.peers.tool import run_tool
from toolkit.checkpoint.config import read_config
from toolkit.errors import ToolkitError
from toolkit.evaluate.parity import matching_prefix
from toolkit.evaluate.session import continuations
from toolkit.files import link_or_copy

ROOT: Final = Path(__file__).resolve().parent.parent
WORK: Final = ROOT / "build" / "webgpu"
PROFILES: Final = ("gpu-head", "cpu-head")
PROMPT_TOKENS: Final = 128
NEW_TOKENS: Final = 64
_COMPARED_TOKENS: Final = 32
_HEADS: Final = ("model", "form", "prefill", "decode", "tokens as on the CPU")


def exported(model: str, profile: str) -> Path:
    """A bundle of a model's shape for webgpu; of tiny-r1 its own weights."""
    out = WORK / f"{model}-{profile}"
    for stale in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(stale, ignore_errors=True)
    synthetic = model != "tiny-r1"
    changes = [f"profile={profile}", *([] if synthetic else ["quantize.0.bits=8", "bits_per_weight=0"])]
    plans = toolkit.plan(f"{model}-webgpu", out=out, synthetic=synthetic, quality="fast", changes=changes)
    return toolkit.export(plans, note=said)[0]


def without_rounding(bundle: Path) -> Path:
    """The same bundle, its products told to keep their input in float16."""
    out = bundle.with_name(f"{bundle.name}-exact")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in bundle.iterdir():
        link_or_copy(path, out / path.name)
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    (out / "model.onnx").unlink()
    onnx.save(model, out / "model.onnx")
    return out


def row_of(model: str, form: str, bundle: Path, toy: bool) -> list[str]:
    """Speed on the GPU, and the greedy tokens there beside the CPU's."""
    prompt_tokens, new_tokens, repeat = (8, 4, 1) if toy else (PROMPT_TOKENS, NEW_TOKENS, 3)
    prompts = [[5 + k for k in range(prompt_tokens)]]
    new = new_tokens if toy else _COMPARED_TOKENS
    (there,) = continuations(bundle, prompts, new)
    (here,) = continuations(bundle, prompts, new, on_cpu=True)
    speed = toolkit.bench(bundle, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeat=repeat)
    equal = f"{matching_prefix(here, there)} of {len(here)}"
    return [model, form, f"{speed.prefill_tokens_per_s:.0f}", f"{speed.decode_tokens_per_s:.0f}", equal]


def llama_row(model: str, program: Path) -> list[str]:
    """Speed of llama.cpp on the same device, by its own benchmark. Raises PeerError if it does not run."""
    path = WORK / f"{model}-q4_0.gguf"
    if not path.exists():
        write_random_gguf(read_config(ROOT / "models" / model), path)
    words = [str(program), "-m", str(path), "-p", str(PROMPT_TOKENS), "-n", str(NEW_TOKENS), "-r", "3", "-o", "jsonl"]
    log = path.with_suffix(".log")
    run_tool(words, log)
    prompt, new = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{"))
    speeds = [f"{statistics.median(run['samples_ts']):.0f}" for run in (prompt, new)]
    return [model, f"llama.cpp Q4_0, {prompt['backends']}, {prompt['gpu_info']}", *speeds, ""]


def main() -> None:
    """Prints a row as each is measured, so that what a card's minutes did not suffice for is all that is lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["1.5b", "7b"], help="of the recipes, in this order")
    parser.add_argument("--llama-bench", type=Path, metavar="PROGRAM", help="llama.cpp's, to run beside ours")
    parser.add_argument("--toy", action="store_true")
    asked = parser.parse_args()
    try:
        tiny = exported("tiny-r1", "gpu-head")
        for run in toolkit.check(tiny, run=True).runs:
            print(f"{run.software}: {run.error:.2g} of the logits' spread, nodes {run.nodes}", flush=True)
        print_row(_HEADS)
        print_row(["---"] * len(_HEADS))
        print_row(row_of("tiny-r1", "gpu-head", tiny, asked.toy))
        for model in () if asked.toy else asked.models:
            for profile in PROFILES:
                bundle = exported(model, profile)
                print_row(row_of(model, profile, bundle, asked.toy))
                if profile == PROFILES[0]:
                    print_row(row_of(model, "gpu-head, products exact", without_rounding(bundle), asked.toy))
                    if asked.llama_bench:
                        print_row(llama_row(model, asked.llama_bench))
    except ToolkitError as problem:
        raise SystemExit(f"error: {problem}") from None


if __name__ == "__main__":
    main()
