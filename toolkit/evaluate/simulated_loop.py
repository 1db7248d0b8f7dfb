"""onnxruntime-genai's own loop with the transformer in QNN's simulator: what a device would answer, slowly.

The graphs are compiled as they are opened, in a process of its own: native code of vendors may crash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from toolkit import names
from toolkit.apart import ChildFailed, answer, run_apart
from toolkit.bundle.compiled import uncompiled_settings
from toolkit.bundle.genai_config import read_settings, stage_sections
from toolkit.epcontext.htp import PACKAGE, PROVIDER, plugin_library, simulator_options
from toolkit.errors import BundleError
from toolkit.evaluate.session import OpenModel, linked_copy
from toolkit.typed_json import JsonObject


def simulated_continuations(bundle: Path, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """What a bundle makes of each prompt, greedily, its transformer in the simulator; ended by eos, by `new_tokens`, or
    by the context.

    Raises BundleError if the simulator did not run the bundle.
    """
    job = {"bundle": str(bundle), "prompts": list(prompts), "new_tokens": new_tokens}
    try:
        made: list[list[int]] = run_apart("toolkit.evaluate.simulated_loop", job)
    except ChildFailed as failed:
        raise BundleError(f"{PACKAGE} did not run {bundle} in its simulator: {failed.reason}") from None
    return made


def _continue(job: JsonObject) -> list[list[int]]:
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
    answer(_continue)
