"""LongRoPE, which turns a text of more tokens than its switch by other factors, from its first token on: on both sides
of the switch, and across it where onnxruntime-genai reads the text anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch

from tests.graphs import write_graphs
from tests.random_models import CASES, make_checkpoint
from toolkit.bundle.genai_config import check_switch
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.errors import UnsupportedError
from toolkit.evaluate.positions import open_positions
from toolkit.reference.decoder import reference_logits
from toolkit.reference.greedy import greedy_continuations
from toolkit.target import TARGETS

_, PHI3 = CASES["phi3"]


@pytest.mark.parametrize("tokens", [24, 25])
def test_texts_on_both_sides_of_the_switch_are_turned_as_transformers_turns_them(tokens: int, tmp_path: Path) -> None:
    model = make_checkpoint("Phi3", {**PHI3, "original_max_position_embeddings": 24}, tmp_path)
    ids = [int(i) for i in np.random.default_rng(tokens).integers(3, 96, tokens)]
    with torch.no_grad():
        oracle = model(torch.tensor([ids])).logits[0].numpy()
    (reference,) = reference_logits(read_config(tmp_path), open_checkpoint(tmp_path).source, [ids])
    assert np.abs(reference - oracle).max() <= 1e-3
    write_graphs(tmp_path, tmp_path / "cpu")
    assert np.abs(open_positions(tmp_path / "cpu").logits(ids) - oracle).max() <= 1e-3
    other = ids[:24] if tokens > 24 else [*ids, 5]
    with torch.no_grad():
        # The same tokens on the other side of the switch differ, or this would prove nothing.
        beside = model(torch.tensor([other])).logits[0, : len(ids)].numpy()
    assert np.abs(oracle[: beside.shape[0]] - beside).max() > 0.05


def test_onnxruntime_genai_reads_a_text_anew_where_it_becomes_long(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    lengths = {"original_max_position_embeddings": 4096, "max_position_embeddings": 16384}
    model = make_checkpoint("Phi3", {**PHI3, **shape, **lengths}, tmp_path)
    write_graphs(tmp_path, tmp_path / "cpu", context_length=8192)
    ids = [int(i) for i in np.random.default_rng(6).integers(3, 96, 4095)]
    read_anew, not_read_anew = (_logits_after(tmp_path / "cpu", kind, ids) for kind in ("phi3", "decoder"))
    with torch.no_grad():
        oracle = model(torch.tensor([read_anew[0]]), logits_to_keep=1).logits[0, -1].numpy()
    assert len(read_anew[0]) == 4099
    assert np.abs(read_anew[1] - oracle).max() <= 1e-3
    assert np.abs(not_read_anew[1] - oracle).max() > 0.01


def _logits_after(bundle: Path, kind: str, ids: list[int]) -> tuple[list[int], np.ndarray[Any, Any]]:
    """A text that goes on for four tokens under a type of onnxruntime-genai, and the logits before the last of them."""
    path = bundle / "genai_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model"] |= {"type": kind, "eos_token_id": [95]}
    path.write_text(json.dumps(settings), encoding="utf-8")
    runtime = og.Model(str(bundle))
    parameters = og.GeneratorParams(runtime)
    parameters.set_search_options(max_length=4200, do_sample=False)
    generator = og.Generator(runtime, parameters)
    generator.append_tokens(ids)
    for _ in range(4):
        generator.generate_next_token()
    return [int(i) for i in generator.get_sequence(0)], np.array(generator.get_logits())[0, -1]


def test_contexts_beyond_the_switch_are_for_what_reads_a_text_anew(tmp_path: Path) -> None:
    make_checkpoint(
        "Phi3", {**PHI3, "original_max_position_embeddings": 4096, "max_position_embeddings": 16384}, tmp_path
    )
    config = read_config(tmp_path)
    check_switch(TARGETS["cpu"], config, 8192)
    for target in TARGETS.values():
        check_switch(target, config, 4096)
        if target.name != "cpu":
            with pytest.raises(UnsupportedError, match=r"LongRoPE.*target cpu, or set context_length=4096"):
                check_switch(target, config, 8192)
    sooner = replace(config, rope=replace(config.rope, original_max_position_embeddings=2048))
    with pytest.raises(UnsupportedError, match=r"does not read one anew there: set context_length=2048"):
        check_switch(TARGETS["cpu"], sooner, 8192)


def test_the_reference_continues_short_texts_as_transformers_does(tmp_path: Path) -> None:
    model = make_checkpoint("Phi3", PHI3, tmp_path)
    prompts = [[5, 17, 40, 8], [9, 3]]
    found = greedy_continuations(read_config(tmp_path), open_checkpoint(tmp_path).source, prompts, 8, {2})
    for prompt, answer in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in answer:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            assert token == ids[-1]
