"""tiny-v3, DeepSeek-V3 in miniature and trained, in four bits: it answers as transformers says its checkpoint does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.graphs import export_bundle
from tests.sources import Changed
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import open_positions
from toolkit.evaluate.rounded import plain_rounding
from toolkit.evaluate.session import continuations
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import reference_logits

# What the default costs it is half of this; plain rounding and a router without its bias cost more.
MEAN_KLD = 0.002
ASKED, READ = 12, 10


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(Path(__file__).parent.parent / "models" / "tiny-v3")


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(load_recipe("tiny-v3-cpu"), checkpoint, tmp_path_factory.mktemp("trained") / "tiny-v3-cpu")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def _lines(checkpoint: Checkpoint) -> list[dict[str, str]]:
    text = (checkpoint.folder / "arithmetic.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _ids(checkpoint: Checkpoint, key: str, count: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    return [tokenizer.encode(line[key], add_special_tokens=False).ids for line in _lines(checkpoint)[:count]]


def _by_transformers(model: PreTrainedModel, ids: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def test_it_writes_what_the_checkpoint_would(bundle: Path, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Of the tokens that onnxruntime-genai writes nearly all are those that transformers puts first after the same
    ones; questions are learned, so that answers are right."""
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    prompts, same, right = _ids(checkpoint, "prompt", ASKED), list[bool](), 0
    for prompt, made, line in zip(prompts, continuations(bundle, prompts, 160), _lines(checkpoint), strict=False):
        assert made[-1] == model.config.eos_token_id
        best = _by_transformers(model, prompt + made).argmax(axis=-1)[len(prompt) - 1 : -1]
        same += (best == made).tolist()
        right += tokenizer.decode(made).rpartition("</think>")[2].strip() == line["answer"]
    assert np.mean(same) >= 0.98 and right >= ASKED // 3, (np.mean(same), right)


def test_four_bits_cost_less_than_plain_rounding_or_a_router_without_its_bias(
    bundle: Path, checkpoint: Checkpoint, model: PreTrainedModel
) -> None:
    texts, source, config = _ids(checkpoint, "text", READ), checkpoint.source, checkpoint.config
    biases = [moe.choice_bias for moe in decoder_of(config).moes]
    unbiased = Changed(source, {name: np.zeros_like(source.read(name)) for name in biases})
    opened = open_positions(bundle)
    found = {
        "exact": reference_logits(config, source, texts),
        "bundle": [opened.logits(ids) for ids in texts],
        "plain": reference_logits(config, plain_rounding(source), texts),
        "unbiased": reference_logits(config, unbiased, texts),
    }
    mean_kld = {}
    for name, logits in found.items():
        compared = Comparison()
        for ids, ours in zip(texts, logits, strict=True):
            compared.add(_by_transformers(model, ids), ours, ids)
        mean_kld[name] = compared.figures().mean_kld
    assert mean_kld["exact"] < 1e-6
    assert mean_kld["bundle"] < MEAN_KLD < min(mean_kld["plain"], mean_kld["unbiased"]), mean_kld
