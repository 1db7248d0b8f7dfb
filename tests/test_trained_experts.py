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

import toolkit
from tests.graphs import export_bundle
from tests.sources import Changed
from toolkit.checkpoint.anatomy import decoder_of
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import open_positions
from toolkit.evaluate.rounded import plain_rounding
from toolkit.evaluate.session import continuations, open_model
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import reference_logits

# What the recipe costs it is half of this; plain rounding costs more.
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
    ones, and most answers are right."""
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    prompts, same, right = _ids(checkpoint, "prompt", ASKED), list[bool](), 0
    for prompt, made, line in zip(prompts, continuations(bundle, prompts, 160), _lines(checkpoint), strict=False):
        assert made[-1] == model.config.eos_token_id
        best = _by_transformers(model, prompt + made).argmax(axis=-1)[len(prompt) - 1 : -1]
        same += (best == made).tolist()
        right += tokenizer.decode(made).rpartition("</think>")[2].strip() == line["answer"]
    assert np.mean(same) >= 0.99 and right >= 2 * ASKED // 3, (np.mean(same), right)


def _mean_kld(model: PreTrainedModel, texts: list[list[int]], found: list[NDArray[np.float32]]) -> float:
    compared = Comparison()
    for ids, logits in zip(texts, found, strict=True):
        compared.add(_by_transformers(model, ids), logits, ids)
    return compared.figures().mean_kld


def test_four_bits_cost_less_than_plain_rounding(bundle: Path, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    texts, opened = _ids(checkpoint, "text", READ), open_positions(bundle)
    ours = _mean_kld(model, texts, [opened.logits(ids) for ids in texts])
    plain = _mean_kld(model, texts, reference_logits(checkpoint.config, plain_rounding(checkpoint.source), texts))
    assert ours < MEAN_KLD < plain, (ours, plain)


def test_a_graph_in_float32_is_exact_and_no_router_without_its_bias(
    checkpoint: Checkpoint, model: PreTrainedModel, tmp_path: Path
) -> None:
    texts, source, config = _ids(checkpoint, "text", READ), checkpoint.source, checkpoint.config
    opened = open_positions(export_bundle(load_recipe("tiny-v3-cpu"), checkpoint, tmp_path / "b", "fp32"))
    biases = [moe.choice_bias for moe in decoder_of(config).moes]
    unbiased = Changed(source, {name: np.zeros_like(source.read(name)) for name in biases})
    assert _mean_kld(model, texts, [opened.logits(ids) for ids in texts]) < 1e-6
    assert _mean_kld(model, texts, reference_logits(config, source, texts)) < 1e-6
    assert _mean_kld(model, texts, reference_logits(config, unbiased, texts)) > 1e-4


def test_a_trained_head_guesses_most_of_what_is_written(bundle: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """By onnxruntime-genai's MtpGenerator, which shows the head no prompt; what is written is the model's own."""
    plans = toolkit.plan("tiny-v3-cpu", out=tmp_path / "with-its-head", changes=["speculation=mtp"])
    opened = open_model(toolkit.export(plans)[0])
    prompts, looked_at, right = _ids(checkpoint, "prompt", ASKED), 0, 0
    for prompt, alone in zip(prompts, continuations(bundle, prompts, 160), strict=True):
        generator = opened.generator(prompt, len(alone), do_sample=False)
        found = [token for token, _ in opened.steps(generator, len(alone))]
        counted = opened.guesses(generator, len(found))
        assert counted is not None and found == alone
        looked_at, right = looked_at + counted.evaluated, right + counted.accepted
    assert right >= 0.8 * looked_at > 0, (right, looked_at)
