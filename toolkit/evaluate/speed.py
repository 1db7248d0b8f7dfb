"""Speed through onnxruntime-genai, as an app sees it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from toolkit.apart import ChildFailed, answer, run_apart
from toolkit.bundle.genai_config import max_length, stage_sections
from toolkit.errors import BundleError
from toolkit.evaluate.session import open_model
from toolkit.machine import peak_rss_bytes, physical_cores
from toolkit.report.sections import Speed, SpeedRun
from toolkit.typed_json import JsonObject, from_json, to_json


def measure_speed(bundle: Path, prompt_tokens: int, new_tokens: int, repeat: int, on_cpu: bool = False) -> Speed:
    """report.json's `speed`: medians over `repeat` runs, after one that warms up and is not counted.

    Raises BundleError if prompt and continuation do not fit the bundle's context.
    """
    opened = open_model(bundle, on_cpu)
    og, settings, config = opened.og, opened.config, opened.config["model"]
    length = max_length(settings, prompt_tokens, new_tokens)
    fits = length - max_length(settings, prompt_tokens, 0) == new_tokens
    if min(prompt_tokens, new_tokens - 1, repeat) < 1 or not fits:
        raise BundleError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens in {repeat} runs: expected at least 1, 2 and 1, "
            f"and at most {config['context_length']} tokens together, the prompt in whole windows"
        )
    prompt = [i % min(config["vocab_size"], 256) for i in range(prompt_tokens)]
    runs = []
    for _ in range(repeat + 1):
        params = og.GeneratorParams(opened.model)
        params.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = og.Generator(opened.model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        prefilled = time.perf_counter()
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        decode_s = time.perf_counter() - first
        runs.append(SpeedRun(first - start, prompt_tokens / (prefilled - start), (new_tokens - 1) / decode_s))
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


def measure_speed_apart(bundle: Path, prompt_tokens: int, new_tokens: int, repeat: int) -> Speed:
    """Runs `measure_speed` in a process of its own, so that `peak_rss_bytes` is the runtime's alone."""
    job = {"bundle": str(bundle), "sizes": [prompt_tokens, new_tokens, repeat]}
    try:
        return from_json(Speed, run_apart("toolkit.evaluate.speed", job), "the measured speed")
    except ChildFailed as failed:
        raise BundleError(f"the speed of {bundle} could not be measured: {failed.reason}") from None


def _measure(job: JsonObject) -> object:
    """In the child."""
    return to_json(measure_speed(Path(job["bundle"]), *job["sizes"]))


def _threads(config: JsonObject) -> int:
    """The most threads ORT uses for a stage; 0 in the file means one for each physical core."""
    threads = [int(s["session_options"].get("intra_op_num_threads", 0)) for s in stage_sections(config)]
    return max(count or physical_cores() for count in threads)


if __name__ == "__main__":
    answer(_measure)
