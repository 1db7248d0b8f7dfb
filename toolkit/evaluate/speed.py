"""Speed through onnxruntime-genai, as an app sees it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit.apart import ChildFailed, answer, run_apart
from toolkit.bundle.settings import Settings
from toolkit.errors import BundleError
from toolkit.evaluate.guesses import Guesses
from toolkit.evaluate.session import OpenModel, open_model, running
from toolkit.machine import peak_rss_bytes, physical_cores
from toolkit.report.sections import Speed, SpeedRun
from toolkit.typed_json import Json, from_json, to_json

_WARM_UP_TOKENS: Final = 8


def measure_speed(bundle: Path, prompt_tokens: int, new_tokens: int, repeat: int, on_cpu: bool = False) -> Speed:
    """report.json's `speed`: medians over `repeat` runs, after a short one that warms up and is not counted.

    Raises BundleError if prompt and continuation do not fit the bundle's context.
    """
    opened = open_model(bundle, on_cpu)
    _check_room(opened.settings, prompt_tokens, new_tokens, repeat)
    run_once(opened, _prompt(opened, prompt_tokens), new_tokens, min(new_tokens, _WARM_UP_TOKENS))
    return _speed(opened, prompt_tokens, new_tokens, repeat)


def _check_room(settings: Settings, prompt_tokens: int, new_tokens: int, repeat: int) -> None:
    fits = settings.room_after(prompt_tokens, new_tokens) == new_tokens
    if min(prompt_tokens, new_tokens - 1, repeat) < 1 or not fits:
        raise BundleError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens in {repeat} runs: expected at least 1, 2 and 1, "
            f"and at most {settings.context_length} tokens together, the prompt in whole windows"
        )


def _speed(opened: OpenModel, prompt_tokens: int, new_tokens: int, repeat: int) -> Speed:
    """The medians over `repeat` runs of a model that has run before."""
    prompt = _prompt(opened, prompt_tokens)
    timed = [_timed(opened, prompt, new_tokens, new_tokens) for _ in range(repeat)]
    runs, guessed = [run for run, _ in timed], [guesses for _, guesses in timed if guesses]
    return Speed(
        runtime="onnxruntime-genai",
        threads=_threads(opened.settings),
        load_s=opened.load_s,
        prompt_tokens=prompt_tokens,
        ttft_s=statistics.median(run.ttft_s for run in runs),
        prefill_tokens_per_s=statistics.median(run.prefill_tokens_per_s for run in runs),
        decode_tokens_per_s=statistics.median(run.decode_tokens_per_s for run in runs),
        peak_rss_bytes=peak_rss_bytes(),
        runs=tuple(runs),
        speculation=sum(guessed, Guesses()).described(opened.speculation) if opened.speculation else None,
    )


def _prompt(opened: OpenModel, prompt_tokens: int) -> list[int]:
    """A prompt of so many tokens that every vocabulary has."""
    return [i % min(opened.settings.vocab_size, 256) for i in range(prompt_tokens)]


def run_once(opened: OpenModel, prompt: Sequence[int], new_tokens: int, count: int) -> SpeedRun:
    """Times a prompt and the first `count` of the new tokens that there is room for. The first token is waited for
    from before its generator is made, which allocates the cache."""
    return _timed(opened, prompt, new_tokens, count)[0]


def _timed(opened: OpenModel, prompt: Sequence[int], new_tokens: int, count: int) -> tuple[SpeedRun, Guesses | None]:
    """The same with what came of the guesses, where something guesses."""
    og = opened.og
    length = opened.settings.length_for(len(prompt), new_tokens)
    with running():
        start = time.perf_counter()
        params = og.GeneratorParams(opened.model)
        params.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = opened.fresh(params)
        made = time.perf_counter()
        generator.append_tokens(prompt)
        prefilled = time.perf_counter()
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count - 1):
            generator.generate_next_token()
    decode_s = time.perf_counter() - first
    run = SpeedRun(first - start, len(prompt) / (prefilled - made), (count - 1) / decode_s)
    return run, opened.guesses(generator, count)


@dataclass(frozen=True)
class SpeedJob:
    """What the process that measures is told: the arguments of `measure_speed`, and a prompt to continue greedily by so
    many tokens first, which warms up."""

    bundle: str
    prompt_tokens: int
    new_tokens: int
    repeat: int
    continued: tuple[int, ...] = ()
    continued_tokens: int = 0


@dataclass(frozen=True)
class SpeedAnswer:
    """What a bundle made of a prompt greedily, and its speed after that."""

    made: tuple[int, ...]
    speed: Speed


def measure_speed_apart(bundle: Path, prompt_tokens: int, new_tokens: int, repeat: int) -> Speed:
    """Runs `measure_speed` in a process of its own, so that `peak_rss_bytes` is the runtime's alone."""
    return _apart(SpeedJob(str(bundle), prompt_tokens, new_tokens, repeat)).speed


def continue_and_measure(
    bundle: Path, prompt: Sequence[int], continued_tokens: int, prompt_tokens: int, new_tokens: int, repeat: int
) -> SpeedAnswer:
    """Continues `prompt` greedily, ended by eos or after `continued_tokens`, and measures the speed, in one process of
    its own: a model is loaded once for both."""
    return _apart(SpeedJob(str(bundle), prompt_tokens, new_tokens, repeat, tuple(prompt), continued_tokens))


def _apart(job: SpeedJob) -> SpeedAnswer:
    try:
        return from_json(SpeedAnswer, run_apart("toolkit.evaluate.speed", job), "the measured speed")
    except ChildFailed as failed:
        raise BundleError(f"the speed of {job.bundle} could not be measured: {failed.reason}") from None


def _measure(raw: Json) -> Json:
    """In the child."""
    job = from_json(SpeedJob, raw, "the job")
    if not job.continued:
        speed = measure_speed(Path(job.bundle), job.prompt_tokens, job.new_tokens, job.repeat)
        return to_json(SpeedAnswer((), speed))
    opened = open_model(Path(job.bundle))
    _check_room(opened.settings, job.prompt_tokens, job.new_tokens, job.repeat)
    made = tuple(opened.stream(list(job.continued), job.continued_tokens, do_sample=False))
    return to_json(SpeedAnswer(made, _speed(opened, job.prompt_tokens, job.new_tokens, job.repeat)))


def _threads(settings: Settings) -> int:
    """The most threads ORT uses for a stage; 0 in the file means one for each physical core."""
    return max(stage.session_options.intra_op_num_threads or physical_cores() for stage in settings.stages)


if __name__ == "__main__":
    answer(_measure)
