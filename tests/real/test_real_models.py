"""Trained models through every target that runs here: GGUF in, the answers of transformers out.

`make models` fetches them; what is missing is fetched by the first test that asks for it.
"""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from benchmarks.models import CODER_05B, FOLDER, R1_HEADER, SMOLLM2, RealModel, fetch
from tests.conftest import ROOT
from tests.gguf_files import bytes_to_unicode
from tests.graphs import export_bundle
from toolkit.checkpoint.gguf_header import parse_gguf_header
from toolkit.checkpoint.gguf_metadata import Metadata
from toolkit.checkpoint.gguf_tokenizer import tokenizer_config_of, tokenizer_of
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.evaluate.conversation import Conversation
from toolkit.evaluate.parity import Comparison
from toolkit.evaluate.positions import open_positions
from toolkit.evaluate.session import continuations
from toolkit.evaluate.simulator import simulate
from toolkit.pipeline.export import Order, export_bundles
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import reference_logits

MODELS: Final = {"smollm2": SMOLLM2, "coder": CODER_05B}
TARGETS: Final = ("cpu", "cpu-split", "dml", "openvino", "qnn")
ON_CPU: Final = ("dml", "openvino", "qnn")
NEW_TOKENS: Final = 24
# The most that the NPU's graph may lose at 8 bits; SmolLM2's loses .50. What its down_proj of layer 11 reads reaches
# 3,065 where the median channel reaches 1: a range of uint16 over both would leave little of the others.
QDQ_KLD: Final = {SMOLLM2.file: 0.75, CODER_05B.file: 0.15}
QUESTIONS: Final = ("What is the capital of France?", "And of Italy?")
TEXT: Final = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "Natalia sell altogether in April and May? Natalia sold 48 / 2 = 24 clips in May, and 48 + 24 = 72 in all."
)


@pytest.fixture(scope="session", params=MODELS)
def model(request: pytest.FixtureRequest) -> RealModel:
    return MODELS[request.param]


@pytest.fixture(scope="session")
def checkpoint(model: RealModel) -> Checkpoint:
    return open_checkpoint(fetch(model))


@pytest.fixture(scope="session")
def theirs(checkpoint: Checkpoint) -> Iterator[Any]:
    """transformers' model of the same weights in float32."""
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: torch.from_numpy(checkpoint.source.read(name)) for name in checkpoint.source.names()}
    missing = made.load_state_dict(weights, strict=False, assign=True).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    made.tie_weights()
    rotary = type(made.model.rotary_emb)(config=config)  # its buffers are computed, not loaded
    made.model.rotary_emb = rotary
    yield made.eval()
    gc.collect()


@pytest.fixture(scope="session")
def ids(checkpoint: Checkpoint) -> list[int]:
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    return [int(i) for i in tokenizer.encode(TEXT, add_special_tokens=False).ids]


@pytest.fixture(scope="session")
def fp32(
    model: RealModel, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """Unquantized bundles by target, made in one pass; the larger model's of one graph and of a pipeline alone."""
    folder = tmp_path_factory.mktemp("fp32")
    targets = TARGETS if model is SMOLLM2 else ("cpu", "qnn")
    place, length = str(FOLDER / model.file), ["context_length=1024"]
    orders = {target: Order(load_recipe(target, length, place), folder / target) for target in targets}
    yield dict(zip(orders, export_bundles(list(orders.values()), checkpoint, "fp32"), strict=True))
    shutil.rmtree(folder)


def test_the_reference_has_transformers_logits(checkpoint: Checkpoint, theirs: Any, ids: list[int]) -> None:
    (made,) = reference_logits(checkpoint.config, checkpoint.source, [ids])
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(made - want).max() < 2e-3 * want.std()
    # A model that was read wrongly is no better than chance: 10 nats a token.
    loss = -torch.log_softmax(torch.from_numpy(made[:-1]), -1)[range(len(ids) - 1), ids[1:]].mean()
    assert float(loss) < 3.0


def test_bundles_have_transformers_logits(fp32: dict[str, Path], theirs: Any, ids: list[int]) -> None:
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0].numpy()
    for target, bundle in fp32.items():
        made = open_positions(bundle).logits(ids, len(ids) - 3)
        assert np.abs(made - want).max() < 5e-3 * want.std(), target


def test_genai_writes_what_transformers_writes(fp32: dict[str, Path], theirs: Any, ids: list[int]) -> None:
    prompts = [ids[:length] for length in (5, 64, len(ids))]
    want = []
    for prompt in prompts:
        whole = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        want.append(whole[0, len(prompt) :].tolist())
    for target, bundle in fp32.items():
        assert continuations(bundle, prompts, NEW_TOKENS, on_cpu=target in ON_CPU) == want, target


def test_two_turns_follow_the_checkpoints_template(
    fp32: dict[str, Path], checkpoint: Checkpoint, theirs: Any, model: RealModel
) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint.folder)
    conversation, messages = Conversation(fp32["cpu"], NEW_TOKENS), list[dict[str, str]]()
    for question in QUESTIONS:
        for _ in conversation.ask(question):
            pass
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        given = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        whole = theirs.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0)
        want = tokenizer.decode(whole[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        assert conversation.answer.text == want.strip() == want
        messages.append({"role": "assistant", "content": want})
    assert "Paris" in messages[1]["content"] and "Rome" in messages[3]["content"]


def test_the_npus_graph_is_near_the_checkpoint_and_the_simulator_near_it(
    checkpoint: Checkpoint, model: RealModel, ids: list[int], tmp_path: Path
) -> None:
    """The QDQ graph on ORT's CPU kernels; SmolLM2 in two windows of the simulator besides."""
    changes = ["profile=lpbq", "quality=fast", "quantize.0.bits=8", "context_length=256", "rotate=false"]
    recipe = load_recipe("qnn", changes, str(FOLDER / model.file))
    bundle = export_bundle(recipe, checkpoint, tmp_path / "qdq")
    ids = ids[:70]
    (exact,) = reference_logits(checkpoint.config, checkpoint.source, [ids])
    comparison = Comparison()
    comparison.add(exact, open_positions(bundle, exact=True).logits(ids, 66), ids)
    assert 0 < comparison.figures().mean_kld < QDQ_KLD[model.file]
    if model is SMOLLM2:
        pytest.importorskip("onnxruntime_qnn", reason="the simulator is in onnxruntime-qnn, for Linux on x86-64")
        found = simulate(bundle, ids, 69, exact)
        assert found.hidden_rms_error < 0.1 and found.top1_agreement > 0.9


def _texts() -> list[str]:
    """More than 500 texts: words, code, numbers, other scripts, spaces, and what special tokens look like."""
    own = []
    for name in ("reasoning.jsonl", "calibration.jsonl"):
        whole = (ROOT / "models" / name).read_text(encoding="utf-8").replace("\\n", "\n")
        own += [whole[start : start + 150] for start in range(0, len(whole), 150)]
    odd = ["", " ", "  a", "\n\n\t x", "it's IT'S we'LL", "3.14 1234567 ½ ²", "naïve nai\u0308ve", "日本語 한국어"]
    odd += [
        "🙂👩\u200d👩",
        "def f(x):\n    return x**2\n\n\n",
        "<|im_start|>user\nhi<|im_end|>",
        "a\u00a0b\u3000c\r\nd",
    ]
    odd += [f"{left}{middle}{right}" for left in odd[1:9] for middle in (" ", "\n", "") for right in odd[1:9]]
    return [*own[:400], *odd]


def _by_hand(text: str, merges: dict[tuple[str, str], int], pattern: Any, nfc: bool) -> list[str]:
    """Byte-level BPE written out (Sennrich et al., arXiv 1508.07909): the pieces of a text without special tokens."""
    letters, pieces = bytes_to_unicode(), list[str]()
    for word in pattern.findall(unicodedata.normalize("NFC", text) if nfc else text):
        parts = [letters[byte] for byte in word.encode("utf-8")]
        while len(parts) > 1:
            ranks = [merges.get(pair, len(merges)) for pair in itertools.pairwise(parts)]
            if min(ranks) == len(merges):
                break
            best = ranks.index(min(ranks))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        pieces += parts
    return pieces


# What each `pre` cuts a text into, from the models' own Python: tokenization_qwen.py, and GPT-2's with single digits.
PATTERNS: Final = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+|\p{N}",
}


@pytest.mark.parametrize("name", ["smollm2", "coder", "r1"])
def test_the_tokenizer_is_the_models_own_on_500_texts(name: str) -> None:
    regex = pytest.importorskip("regex")
    file = R1_HEADER if name == "r1" else MODELS[name]
    if name == "r1" and not (FOLDER / file.file).is_file():
        pytest.skip("the header of the R1 distill is fetched by `make models ALL=1`")
    path = fetch(file)
    with path.open("rb") as opened:
        read = Metadata(parse_gguf_header(opened, 1 << 40, path).metadata, path)
    raw = tokenizer_of(read)
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    pairs = [merge.split(" ") for merge in raw["model"]["merges"]]
    merges = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
    pattern = regex.compile(PATTERNS["smollm" if name == "smollm2" else "qwen2"])
    special = regex.compile("|".join(regex.escape(token["content"]) for token in raw["added_tokens"]))
    texts = _texts()
    assert len(texts) >= 500
    for text in texts:
        want, at = list[str](), 0
        for found in [*special.finditer(text), None]:
            stop = found.start() if found else len(text)
            if name == "smollm2":  # Digits come before everything, and are words by themselves.
                for stretch in regex.findall(r"\p{N}|[^\p{N}]+", text[at:stop]):
                    want += _by_hand(stretch, merges, pattern, nfc=False)
            else:
                want += _by_hand(text[at:stop], merges, pattern, nfc=name == "coder")
            if found:
                want.append(found[0])
                at = found.end()
        made = tokenizer.encode(text, add_special_tokens=False)
        assert made.tokens == want, text
        said = unicodedata.normalize("NFC", text) if name == "coder" else text
        assert tokenizer.decode(made.ids, skip_special_tokens=False) == said


def test_the_r1_distills_tokenizer_is_as_deepseek_has_it() -> None:
    if not (FOLDER / R1_HEADER.file).is_file():
        pytest.skip("the header of the R1 distill is fetched by `make models ALL=1`")
    path = fetch(R1_HEADER)
    with path.open("rb") as opened:
        read = Metadata(parse_gguf_header(opened, 1 << 40, path).metadata, path)
    config = tokenizer_config_of(read)
    assert (config["bos_token"], config["eos_token"]) == ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    assert config["add_bos_token"] is True and "<｜Assistant｜>" in str(config["chat_template"])
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_of(read)))
    # The ids in the published config.json and generation_config.json.
    assert tokenizer.encode("<｜begin▁of▁sentence｜><｜User｜>", add_special_tokens=False).ids == [151646, 151644]
    assert tokenizer.encode("<think>", add_special_tokens=False).ids == [151648]
    assert tokenizer.encode("Hi").ids[0] == 151646
