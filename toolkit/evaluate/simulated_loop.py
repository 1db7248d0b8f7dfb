"""onnxruntime-genai's own loop with the transformer in QNN's simulator: what a device would answer, slowly.

The graphs are compiled as they are opened, in a process of its own: native code of vendors may crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import names
from toolkit.apart import ChildFailed, answer, run_apart
from toolkit.bundle.settings import read_settings
from toolkit.bundle.stage_files import uncompiled_settings
from toolkit.epcontext.htp import PACKAGE, PROVIDER, plugin_library, simulator_options
from toolkit.errors import BundleError
from toolkit.evaluate.linked import linked_copy
from toolkit.evaluate.session import OpenModel
from toolkit.typed_json import Json, from_json, to_json


@dataclass(frozen=True)
class LoopJob:
    """What the process with the simulator is told: prompts as token ids, and how many more tokens each may get."""

    bundle: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int


@dataclass(frozen=True)
class Continued:
    """What it answers: the new tokens of each prompt."""

    continuations: tuple[tuple[int, ...], ...]


def simulated_continuations(bundle: Path, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """What a bundle makes of each prompt, greedily, its transformer in the simulator; ended by eos, by `new_tokens`, or
    by the context.

    Raises BundleError if the simulator did not run the bundle.
    """
    job = LoopJob(str(bundle), tuple(tuple(prompt) for prompt in prompts), new_tokens)
    try:
        made = from_json(Continued, run_apart("toolkit.evaluate.simulated_loop", job), "what the loop made")
    except ChildFailed as failed:
        raise BundleError(f"{PACKAGE} did not run {bundle} in its simulator: {failed.reason}") from None
    return [list(tokens) for tokens in made.continuations]


def _continue(raw: Json) -> Json:
    """In the child."""
    import onnxruntime_genai as og

    job = from_json(LoopJob, raw, "the job")
    bundle = Path(job.bundle)
    settings = uncompiled_settings(read_settings(bundle))
    # The folder goes when it is collected.
    folder = linked_copy(bundle, settings)
    settings = settings.with_provider_options(
        lambda _, given: simulator_options(given, Path(folder.name)), {"session.disable_cpu_ep_fallback": "1"}
    )
    # On a device they are the host's; here the simulator would lose its own, attention's float16 below 6e-5.
    settings = settings.with_session_options({"session.set_denormal_as_zero": "0"})
    (Path(folder.name) / names.GENAI_CONFIG_FILE).write_text(settings.text, encoding="utf-8")
    og.register_execution_provider_library(PROVIDER, plugin_library())
    opened = OpenModel(og, og.Model(folder.name), settings, 0.0, 0, folder)
    streams = (opened.stream(list(prompt), job.new_tokens, do_sample=False) for prompt in job.prompts)
    return to_json(Continued(tuple(tuple(stream) for stream in streams)))


if __name__ == "__main__":
    answer(_continue)
