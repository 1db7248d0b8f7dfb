"""Speed through onnxruntime-genai, as an app sees it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit.apart import ChildFailed, answer, run_apart
from toolkit.bundle.settings import Settings
from toolkit.errors import BundleError
from toolkit.evaluate.session import open_model, running
from toolkit.machine import peak_rss_bytes, physical_cores
from toolkit.report.sections import Speed, SpeedRun
from toolkit.typed_json import Json, from_json, to_json

_WARM_UP_TOKENS: Final = 8


def measure_speed(bundle: Path, prompt_tokens: int, new_tokens: int, repeat: int, on_cpu: bool = False) -> Speed:
    """report.json's `speed`: medians over `repeat` runs, after a short one that warms up and is not counted.

    Raises BundleError if prompt and continuation do not fit the bundle's context.
    """
    opened = open_model(bundle, on_cpu)
    og, settings = opened.og, opened.settings
    length = settings.length_for(prompt_tokens, new_tokens)
    fits = settings.room_after(prompt_tokens, new_tokens) == new_tokens
    if min(prompt_tokens, new_tokens - 1, repeat) < 1 or not fits:
        raise BundleError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens in {repeat} runs: expected at least 1, 2 and 1, "
            f"and at most {settings.context_length} tokens together, the prompt in whole windows"
        )
    prompt = [i % min(settings.vocab_size, 256) for i in range(prompt_tokens)]
    runs = []
    for count in [min(new_tokens, _WARM_UP_TOKENS), *[new_tokens] * repeat]:
        with running():
            params = og.GeneratorParams(opened.model)
            params.set_search_options(do_sample=False, min_length=length, max_length=length)
            generator = og.Generator(opened.model, params)
            start = time.perf_counter()
            generator.append_tokens(prompt)
            prefilled = time.perf_counter()
            generator.generate_next_token()
            first = time.perf_counter()
            for _ in range(count - 1):
                generator.generate_next_token()
        decode_s = time.perf_counter() - first
        runs.append(SpeedRun(first - start, prompt_tokens / (prefilled - start), (count - 1) / decode_s))
    counted = runs[1:]
    return Speed(
        runtime="onnxruntime-genai",
        threads=_threads(settings),
        load_s=opened.load_s,
        prompt_tokens=prompt_tokens,
        ttft_s=statistics.median(run.ttft_s for run in counted),
        prefill_tokens_per_s=statistics.median(run.prefill_tokens_per_s for run in counted),
        decode_tokens_per_s=statistics.median(run.decode_tokens_per_s for run in counted),
        peak_rss_bytes=peak_rss_bytes(),
        runs=tuple(counted),
    )


@dataclass(frozen=True)
class SpeedJob:
    """What the process that measures is told: the arguments of `measure_speed`."""

    bundle: str
    prompt_tokens: int
    new_tokens: int
    repeat: int


def measure_speed_apart(bundle: Path, prompt_tokens: int, new_tokens: int, repeat: int) -> Speed:
    """Runs `measure_speed` in a process of its own, so that `peak_rss_bytes` is the runtime's alone."""
    job = SpeedJob(str(bundle), prompt_tokens, new_tokens, repeat)
    try:
        return from_json(Speed, run_apart("toolkit.evaluate.speed", job), "the measured speed")
    except ChildFailed as failed:
        raise BundleError(f"the speed of {bundle} could not be measured: {failed.reason}") from None


def _measure(raw: Json) -> Json:
    """In the child."""
    job = from_json(SpeedJob, raw, "the job")
    return to_json(measure_speed(Path(job.bundle), job.prompt_tokens, job.new_tokens, job.repeat))


def _threads(settings: Settings) -> int:
    """The most threads ORT uses for a stage; 0 in the file means one for each physical core."""
    return max(stage.session_options.intra_op_num_threads or physical_cores() for stage in settings.stages)


if __name__ == "__main__":
    answer(_measure)
