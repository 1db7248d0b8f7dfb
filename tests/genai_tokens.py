"""What onnxruntime-genai itself writes, without this toolkit's loop around it."""

from __future__ import annotations

from pathlib import Path

import onnxruntime_genai as og


def greedy_by_genai(bundle: Path, ids: list[int], length: int) -> list[int]:
    """Returns token ids and what a bundle continues them with greedily, up to so many in all or an end."""
    runtime = og.Model(str(bundle))
    parameters = og.GeneratorParams(runtime)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator, found = og.Generator(runtime, parameters), list(ids)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found
