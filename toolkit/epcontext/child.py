"""One part of a transformer to EPContext files, in a process of its own (toolkit/apart.py).

Context and iterator are compiled one after the other and share their weights in one binary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from toolkit import names
from toolkit.apart import answer
from toolkit.epcontext.htp import open_htp
from toolkit.machine import peak_rss_bytes
from toolkit.typed_json import Json, from_json, to_json

_MS = "com.microsoft"


@dataclass(frozen=True)
class CompileJob:
    """What the compiler's process is told: the bundle, the stages of one part, the compiler's options, where to."""

    bundle: str
    stages: tuple[str, ...]
    options: dict[str, str]
    out: str


@dataclass(frozen=True)
class CompileCost:
    """What it answers: the most memory it took."""

    peak_rss_bytes: int


def compile_stages(bundle: Path, stages: Sequence[str], options: dict[str, str], out: Path) -> None:
    """Writes `<stage>_ctx.onnx` for each, and the binary of the first, into `out`."""
    sessions = []
    for stage in stages:
        entries = {
            "ep.context_enable": "1",
            "ep.context_file_path": str(out / names.compiled_file(stage)),
            "ep.context_embed_mode": "0",
            "ep.share_ep_contexts": "1",
        }
        if stage == stages[-1]:
            entries["ep.stop_share_ep_contexts"] = "1"
        graph = bundle / names.stage_file(stage)
        # Kept until the last is compiled: what is shared lives in the first.
        sessions.append(open_htp(graph, {**options, "enable_htp_weight_sharing": "1"}, entries, out))
        _lower_versions(out / names.compiled_file(stage))


def _lower_versions(path: Path) -> None:
    """ONNX Runtime writes the newest IR version and every domain it knows, which older releases refuse to load."""
    model = onnx.load(path)
    model.ir_version = 10
    del model.opset_import[:]
    model.opset_import.extend([onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(_MS, 1)])
    onnx.save(model, path)


def _compile(raw: Json) -> Json:
    """Compiles; returns what it took in memory."""
    job = from_json(CompileJob, raw, "the job")
    compile_stages(Path(job.bundle), job.stages, job.options, Path(job.out))
    return to_json(CompileCost(peak_rss_bytes()))


if __name__ == "__main__":
    answer(_compile)
