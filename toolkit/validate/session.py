"""A bundle opened through onnxruntime-genai, as an app would."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from toolkit import names
from toolkit.bundle.genai_config import max_length, read_genai_config
from toolkit.errors import BundleError, MachineError


def continuations(bundle: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What onnxruntime-genai makes of each prompt, greedily, ended by eos or after `new_tokens`."""
    og, model, _ = open_model(bundle)
    config = read_genai_config(bundle)
    made = []
    for prompt in prompts:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=max_length(config, len(prompt), new_tokens))
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        tokens: list[int] = []
        while len(tokens) < new_tokens and not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        made.append(tokens)
    return made


def open_model(bundle: Path) -> tuple[Any, Any, float]:
    """(the onnxruntime_genai module, the bundle's Model, seconds to load it).

    Raises BundleError for a folder that is none, MachineError if onnxruntime-genai is missing.
    """
    if not (bundle / names.GENAI_CONFIG_FILE).is_file():
        raise BundleError(f"{bundle} has no {names.GENAI_CONFIG_FILE}: not a bundle")
    try:
        import onnxruntime_genai as og
    except ImportError:
        raise MachineError("onnxruntime-genai is not installed: pip install onnxruntime-genai") from None
    start = time.perf_counter()
    return og, og.Model(str(bundle)), time.perf_counter() - start
