"""The reference against Hugging Face transformers, and the fp32 graph against both, for each family and RoPE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
import torch
import transformers

from tests.graphs import WINDOW, write_graphs
from tests.random_models import CASES, make_checkpoint
from toolkit.bundle.operators import check_experts
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.weights import open_weights
from toolkit.errors import UnsupportedError
from toolkit.evaluate.positions import open_positions
from toolkit.reference.decoder import reference_logits
from toolkit.target import CPU_EP, TARGETS


@pytest.mark.parametrize("case", CASES)
def test_reference_and_graph_match_transformers(case: str, tmp_path: Path) -> None:
    family, extra = CASES[case]
    model = make_checkpoint(family, extra, tmp_path)
    ids = [int(i) for i in np.random.default_rng(3).integers(3, 96, 40)]
    with torch.no_grad():
        oracle = model(torch.tensor([ids])).logits[0].numpy()
    config, source = read_config(tmp_path), open_checkpoint(tmp_path).source
    (reference,) = reference_logits(config, source, [ids])
    assert np.abs(reference - oracle).max() <= 1e-3
    for target, row in TARGETS.items():
        if config.structure.experts and row.accelerator.execution_provider != CPU_EP:
            with pytest.raises(UnsupportedError, match=r"QMoE is not among its operators.*convert it for target cpu"):
                check_experts(row, config)
            continue
        if any(config.structure.sliding_windows) and not row.form.local_window:
            with pytest.raises(UnsupportedError, match=r"knows no sliding window.*context_length=[56]"):
                write_graphs(tmp_path, tmp_path / target, target)
            continue
        write_graphs(tmp_path, tmp_path / target, target)
        for graph in (tmp_path / target).glob("*.onnx"):
            # onnx does not know ORT's SimplifiedLayerNormalization, which lives in the default domain.
            if row.form.opset >= 23:
                onnx.checker.check_model(str(graph))
        bundle = open_positions(tmp_path / target)
        assert np.abs(bundle.logits(ids) - oracle).max() <= 1e-3
        # The same tokens as a prompt and single steps: the cache, and sliding windows that move over it; all the way
        # once, elsewhere until a window further on nothing of the prompt's last is left.
        for prompt in (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 3):
            length = len(ids) if prompt == 1 else prompt + WINDOW + 1
            assert np.abs(bundle.logits(ids[:length], prompt) - oracle[:length]).max() <= 1e-3


@pytest.mark.parametrize("case", {family: case for case, (family, _) in reversed(CASES.items())}.values())
def test_onnxruntime_genai_continues_as_transformers_does(case: str, tmp_path: Path) -> None:
    model = make_checkpoint(*CASES[case], tmp_path)
    write_graphs(tmp_path, tmp_path / "bundle")
    ids = [int(i) for i in np.random.default_rng(6).integers(3, 96, 9)]
    runtime = og.Model(str(tmp_path / "bundle"))
    parameters = og.GeneratorParams(runtime)
    parameters.set_search_options(max_length=len(ids) + 32, do_sample=False)
    generator = og.Generator(runtime, parameters)
    generator.append_tokens(ids)
    found, expected = list(ids), list(ids)
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
        with torch.no_grad():
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert found == expected
    assert len(found) == len(ids) + 32 or found[-1] == 2


def test_reference_and_graph_match_transformers_on_a_trained_llama(stories260k: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    ids = [1, *(int(i) for i in np.random.default_rng(4).integers(3, 512, 55))]
    with torch.no_grad():
        oracle = model(torch.tensor([ids])).logits[0].numpy()
    config = read_config(stories260k)
    (reference,) = reference_logits(config, open_weights(stories260k, config), [ids])
    assert np.abs(reference - oracle).max() <= 1e-3
    for target in TARGETS:
        write_graphs(stories260k, tmp_path / target, target)
        assert np.abs(open_positions(tmp_path / target).logits(ids, prompt=20) - oracle).max() <= 1e-3
