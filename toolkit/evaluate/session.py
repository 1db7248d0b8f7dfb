"""A bundle opened through onnxruntime-genai, as an app would."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit import names
from toolkit.bundle.cache import cache_bytes, graph_cache_bytes
from toolkit.bundle.settings import Settings, read_settings
from toolkit.bundle.speculative import draft_graph, head_settings, read_speculation, speculation_of
from toolkit.bundle.stage_files import uncompiled_settings
from toolkit.errors import BundleError, MachineError, UnsupportedError
from toolkit.evaluate.guesses import Guesses, MtpText, can_speculate, guesses_of, speculating_config
from toolkit.evaluate.linked import linked_copy
from toolkit.evaluate.providers import make_known_to_genai, missing_provider, provider_is_here
from toolkit.machine import free_memory_bytes


@dataclass(frozen=True)
class OpenModel:
    """The onnxruntime_genai module, the bundle's Model, its settings, and the seconds it took to load.

    `token_bytes` is what a token takes of the cache. `folder` holds the files of a model opened on the CPU for as long
    as it is used. `speculation` is what guesses tokens ahead, None where nothing does; `head` is the MTP head's Model
    where that guesses.
    """

    og: Any
    model: Any
    settings: Settings
    load_s: float
    token_bytes: int
    folder: tempfile.TemporaryDirectory[str] | None
    speculation: str | None = None
    head: Any = None

    def longest(self) -> int:
        """Returns how many tokens a request may have that sets no limit: the context, or what half of the free memory
        holds of a cache, if that is less."""
        least, most = self.settings.max_length, self.settings.context_length
        return max(least, min(most, free_memory_bytes() // 2 // max(self.token_bytes, 1)))

    def fresh(self, params: Any, tells_logits: bool = False) -> Any:
        """Returns a generator of these parameters that has read nothing. No head guesses where logits are told, or for
        a text that is held to a grammar."""
        if self.head is None or tells_logits:
            return self.og.Generator(self.model, params)
        return MtpText(self.og, self.model, self.head, params)

    def guesses(self, generator: Any, tokens: int) -> Guesses | None:
        """What came of the guesses of a generator after so many new tokens; None where nothing guessed."""
        guessed = self.speculation is not None and (self.head is None or isinstance(generator, MtpText))
        return guesses_of(generator, tokens) if guessed else None

    def generator(
        self, prompt: Any, new_tokens: int, grammar: str | None = None, tells_logits: bool = False, **options: Any
    ) -> Any:
        """Returns a fresh generator that has read the prompt, with room for `new_tokens` where the context has it.

        What it writes keeps to `grammar`, in llguidance's Lark; `tells_logits` is whether logits will be asked of it.
        Raises BundleError if the runtime refuses, UnsupportedError if it refuses the grammar, MachineError if a cache
        beyond the bundle's own does not fit.
        """
        length = self.settings.length_for(len(prompt), new_tokens)
        if length > self.settings.max_length:
            _check_cache(length, self.token_bytes * length)
        with running():
            params = self.og.GeneratorParams(self.model)
            params.set_search_options(max_length=length, **options)
        with running() if grammar is None else _held_to_a_grammar():
            if grammar is not None:
                params.set_guidance("lark_grammar", grammar)
            generator = self.fresh(params, tells_logits or grammar is not None)
        with running():
            generator.append_tokens(prompt)
        return generator

    def stream(self, prompt: list[int], new_tokens: int, **options: Any) -> Iterator[int]:
        """Yields the tokens after a prompt as they come, ended by (and including) eos, by `new_tokens` or by the
        context."""
        for token, _ in self.steps(self.generator(prompt, new_tokens, **options), new_tokens):
            yield token

    def steps(
        self, generator: Any, new_tokens: int, with_logits: bool = False
    ) -> Iterator[tuple[int, npt.NDArray[Any] | None]]:
        """Yields each token of a generator as `stream` does, with the logits [vocab_size] it was chosen by if they are
        asked for."""
        # Around the loop: once a token it took as long as reading the token's text.
        with running():
            for _ in range(new_tokens):
                if generator.is_done():
                    return
                # The buffer is the runtime's own, and the next step writes over it.
                logits = np.array(generator.get_logits()).reshape(-1) if with_logits else None
                generator.generate_next_token()
                yield int(generator.get_next_tokens()[0]), logits


@contextmanager
def running() -> Iterator[None]:
    """Makes a BundleError of whatever onnxruntime-genai throws while it runs a bundle."""
    try:
        yield
    except Exception as problem:  # its errors have no common root short of Exception
        raise BundleError(
            f"onnxruntime-genai cannot run the bundle: {_first_line(problem)}: see `toolkit check`"
        ) from None


@contextmanager
def _held_to_a_grammar() -> Iterator[None]:
    """Makes an UnsupportedError of what onnxruntime-genai throws where a grammar is set, and read."""
    try:
        yield
    except Exception as problem:  # its errors have no common root short of Exception
        raise UnsupportedError(
            f"onnxruntime-genai cannot hold the answer to this schema: {_first_line(problem)}"
        ) from None


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:300]


def open_model(bundle: Path, on_cpu: bool = False) -> OpenModel:
    """Opens a bundle; `on_cpu` runs every stage on the CPU, whatever it was made for.

    Raises BundleError for a folder that is none, MachineError if onnxruntime-genai, an execution provider or the memory
    for the cache is missing.
    """
    if not (bundle / names.GENAI_CONFIG_FILE).is_file():
        raise BundleError(f"{bundle} has no {names.GENAI_CONFIG_FILE}: not a bundle")
    for path in bundle.iterdir():
        if not (path.is_file() or path.is_dir()):
            raise BundleError(f"{path} is no regular file, which a runtime would wait for: `toolkit verify {bundle}`")
    try:
        import onnxruntime_genai as og
    except ImportError:
        raise MachineError("onnxruntime-genai is not installed: pip install onnxruntime-genai") from None
    settings = read_settings(bundle)
    if settings.is_mtp_head:
        raise BundleError(f"{bundle} is an MTP head, which guesses for its model's bundle: name that, without -mtp")
    guessing = read_speculation(bundle, on_cpu) if can_speculate(og) else None
    if not can_speculate(og, speculation_of(guessing)):
        guessing = None
    cache = cache_bytes(bundle, settings, settings.max_length)
    if draft := draft_graph(guessing):
        cache += graph_cache_bytes(bundle / draft, settings.max_length)
    _check_cache(settings.max_length, cache)
    folder = None
    if on_cpu and settings.providers():
        folder = linked_copy(bundle, uncompiled_settings(settings).on_cpu())
    elif missing := [name for name in settings.providers() if not make_known_to_genai(og, name)]:
        raise MachineError(missing_provider(missing[0]))
    start = time.perf_counter()
    try:
        place = folder.name if folder else str(bundle)
        model = og.Model(place if guessing is None else speculating_config(og, place, guessing))
        told = head_settings(guessing)
        head = None if told is None else og.Model(speculating_config(og, place, told))
    except Exception as problem:  # whatever the runtime throws
        raise BundleError(f"onnxruntime-genai cannot open {bundle}: {_first_line(problem)}") from None
    load_s, token_bytes = time.perf_counter() - start, cache // settings.max_length
    return OpenModel(og, model, settings, load_s, token_bytes, folder, speculation_of(guessing), head)


def continuations(bundle: Path, prompts: list[list[int]], new_tokens: int, on_cpu: bool = False) -> list[list[int]]:
    """Returns what onnxruntime-genai makes of each prompt, greedily, ended by eos or after `new_tokens`."""
    opened = open_model(bundle, on_cpu)
    return [list(opened.stream(prompt, new_tokens, do_sample=False)) for prompt in prompts]


def is_here(settings: Settings) -> bool:
    """Returns whether this machine has every execution provider a bundle asks for."""
    return all(provider_is_here(name) for name in settings.providers())


def _check_cache(length: int, needed: int) -> None:
    if needed > (free := free_memory_bytes()):
        raise MachineError(
            f"the KV cache of {length} tokens takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
            "ask for fewer tokens, export with a smaller --set context_length, or close other programs"
        )
