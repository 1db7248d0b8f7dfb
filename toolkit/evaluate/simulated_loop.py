"""onnxruntime-genai's own loop with the transformer in QNN's simulator: what a device would answer, slowly.

The graphs are compiled as they are opened, in a process of its own: native code of vendors may crash.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.bundle.compiled import uncompiled_settings
from toolkit.bundle.genai_config import read_settings, stage_sections
from toolkit.epcontext.htp import PACKAGE, PROVIDER, plugin_library, simulator_options
from toolkit.errors import BundleError
from toolkit.evaluate.session import OpenModel, linked_copy

_CHILD: Final = [sys.executable, "-m", "toolkit.evaluate.simulated_loop"]


def simulated_continuations(bundle: Path, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """What a bundle makes of each prompt, greedily, its transformer in the simulator; ended by eos, by `new_tokens`, or
    by the context.

    Raises BundleError if the simulator did not run the bundle.
    """
    job = {"bundle": str(bundle), "prompts": list(prompts), "new_tokens": new_tokens}
    done = subprocess.run(
        _CHILD, input=json.dumps(job), capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    line = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not line.startswith("["):
        said = [text for text in done.stderr.strip().splitlines() if text.strip()] or [f"exit code {done.returncode}"]
        raise BundleError(f"{PACKAGE} did not run {bundle} in its simulator: {said[-1][:300]}")
    made: list[list[int]] = json.loads(line)
    return made


def _continue(job: dict[str, Any]) -> list[list[int]]:
    """In the child."""
    import onnxruntime_genai as og

    bundle = Path(job["bundle"])
    settings = uncompiled_settings(read_settings(bundle))
    # The folder goes when it is collected.
    folder = linked_copy(bundle, settings)
    for section in stage_sections(settings):
        options = section["session_options"]
        for entry in options["provider_options"]:
            entry |= {name: simulator_options(given, Path(folder.name)) for name, given in entry.items()}
            options["session.disable_cpu_ep_fallback"] = "1"
    (Path(folder.name) / names.GENAI_CONFIG_FILE).write_text(json.dumps(settings), encoding="utf-8")
    og.register_execution_provider_library(PROVIDER, plugin_library())
    opened = OpenModel(og, og.Model(folder.name), settings, 0.0, folder)
    return [list(opened.stream(prompt, job["new_tokens"], do_sample=False)) for prompt in job["prompts"]]


if __name__ == "__main__":
    print(json.dumps(_continue(json.loads(sys.stdin.read()))))
