"""Which nodes of a dml bundle's one graph a GPU provider takes, without and with the bundle's layer assignment.

DirectML is on Windows alone, so WebGPU, the other provider that works kernel by kernel, stands in for it; it needs an
environment of its own (`pip install onnxruntime-webgpu==1.27.0 numpy`) and a Vulkan driver, a software one will do.
`python benchmarks/layer_assignment.py BUNDLE`
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import onnxruntime as ort

CPU, GPU = "CPUExecutionProvider", "WebGpuExecutionProvider"
KEY = "session.layer_assignment_settings"


def part_of(name: str) -> str:
    """Embedding, LM head, lengths or the transformer."""
    parts = {"/model/embed_tokens/": "embedding", "/lm_head/": "LM head", "/model/lengths/": "lengths"}
    return next((part for prefix, part in parts.items() if name.startswith(prefix)), "transformer")


def on_cpu(bundle: Path, setting: str | None) -> Counter[str]:
    """The nodes ORT left to the CPU, by part. ORT 1.27 lists no others; they are the GPU provider's."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if setting:
        options.add_session_config_entry(KEY, setting)
    session = ort.InferenceSession(str(bundle / "model.onnx"), options, providers=[GPU, CPU])
    groups = session.get_provider_graph_assignment_info()
    return Counter(part_of(node.name) for group in groups if group.ep_name == CPU for node in group.get_nodes())


def main() -> None:
    """Prints what the CPU has without the assignment and with it."""
    bundle = Path(sys.argv[1])
    config = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))
    setting = config["model"]["decoder"]["session_options"][KEY]
    for name, value in (("without", None), (f"with {setting}", setting)):
        print(f"{name}, the CPU has: " + ", ".join(f"{n} {part}" for part, n in sorted(on_cpu(bundle, value).items())))


if __name__ == "__main__":
    main()
