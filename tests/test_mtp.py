"""An MTP head beside its model: what it computes is DeepSeek-V3's section 2.2 (arXiv 2412.19437) written out around
transformers' own layer, and onnxruntime-genai's MtpGenerator writes with it what the model writes alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import torch
from numpy.typing import NDArray

import toolkit
from tests.checkpoint_folders import save_tensors, set_keys, tensors_of
from tests.genai_tokens import greedy_by_genai
from tests.graphs import recipe_for
from tests.quantized_folders import BLOCKS, fp8_blocks, quantize_folder
from tests.random_models import CASES, make_checkpoint
from toolkit import names
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.manifest import read_manifest, verify_manifest
from toolkit.bundle.speculative import SPECULATION_FILE
from toolkit.calibrate.survey import Wish, survey
from toolkit.checkpoint.opened import mtp_checkpoint, open_checkpoint
from toolkit.errors import BundleError, CheckpointError, UnsupportedError
from toolkit.evaluate.session import OpenModel, open_model
from toolkit.evaluate.speed import measure_speed
from toolkit.evaluate.text_model import TextModel, TextOptions
from toolkit.quant.activations import Rounding
from toolkit.quant.formats import planned_specs
from toolkit.target import CPU_FORM

Floats = torch.Tensor
EPS = 1e-6
LAYERS = 3
NEW_TOKENS = 40
PROMPTS = [[int(i) for i in np.random.default_rng(k).integers(3, 90, 5 + k)] for k in range(3)]


@dataclass(frozen=True)
class Made:
    """A checkpoint with a head, and transformers' models of its layers and of the head's one."""

    folder: Path
    model: Any
    layer: Any
    enorm: Floats
    hnorm: Floats
    eh_proj: Floats

    def hidden(self, ids: Sequence[int]) -> Floats:
        """[T, D]: the model's hidden states behind its final norm."""
        with torch.no_grad():
            states: Floats = self.model.model(torch.tensor([ids])).last_hidden_state[0]
        return states

    def joined(self, ids: Sequence[int], hidden: Floats) -> Floats:
        """[T, 2 D]: each token's embedding and the hidden state before it, normalized, in the checkpoint's order."""
        embedded = self.model.model.embed_tokens.weight[torch.tensor(ids)].detach()
        return torch.cat([_rms(embedded) * self.enorm, _rms(hidden) * self.hnorm], -1)

    def drafts(self, ids: Sequence[int], hidden: Floats) -> tuple[Floats, Floats]:
        """Logits [T, V] of the token after each of `ids`, of which the model's states came before, and the states
        [T, D] that make them: equations 21 to 23."""
        with torch.no_grad():
            x = self.joined(ids, hidden) @ self.eh_proj.T
            states: Floats = self.layer.model(inputs_embeds=x[None]).last_hidden_state[0]
            return states @ self.model.lm_head.weight.T, states

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The model's own tokens after a prompt."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int((self.hidden(ids)[-1] @ self.model.lm_head.weight.T).argmax()))
        return ids[len(prompt) :]

    def counted(self, prompt: list[int], made: list[int]) -> tuple[int, int]:
        """How many guesses are looked at and how many are right where each run checks one."""
        states = self.hidden([*prompt, *made])[len(prompt) - 1 : -1]
        guessed = self.drafts(made, states)[0].argmax(-1).tolist()
        looked_at = right = k = 0
        while k + 1 < len(made):
            looked_at += 1
            hit = guessed[k] == made[k + 1]
            right += hit
            k += 1 + hit
        return looked_at, right


def _rms(x: Floats) -> Floats:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def _make(folder: Path, words: Path) -> Made:
    """A random model, and a head that was fitted to what it writes after the first prompt alone."""
    family, extra = CASES["deepseek-v3"]
    rows = json.loads((words / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    extra = {**extra, "vocab_size": rows, "num_hidden_layers": LAYERS}
    model = make_checkpoint(family, extra, folder)
    layer = make_checkpoint(
        family, {**extra, "num_hidden_layers": 1, "first_k_dense_replace": 0}, folder.with_name("one-layer")
    )
    torch.manual_seed(1)
    for name, parameter in layer.named_parameters():
        # Small beside what it reads, so that a linear fit guesses something.
        parameter.data.mul_(0.1 if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias")) else 1)
    enorm, hnorm = (1 + 0.3 * torch.randn(64) for _ in range(2))
    made = Made(folder, model, layer, enorm, hnorm, torch.zeros(64, 128))
    ids = [*PROMPTS[0], *made.greedy(PROMPTS[0], NEW_TOKENS)]
    states = made.hidden(ids)
    wanted = states[1:] / layer.model.norm.weight.detach()
    fitted = torch.linalg.lstsq(made.joined(ids[1:], states[:-1]), wanted).solution
    made = Made(folder, model, layer, enorm, hnorm, fitted.T.contiguous())
    _save(made)
    for path in words.glob("*"):
        if path.name.startswith(("tokenizer", "chat_template", "special")):
            shutil.copy(path, folder)
    return made


def _save(made: Made) -> None:
    """Writes the head beside the model's tensors, as DeepSeek published it: with copies of what it shares."""
    of, own = f"model.layers.{LAYERS}.", made.layer.state_dict()
    head = {name.replace("model.layers.0.", of): value for name, value in own.items() if ".layers." in name}
    head |= {f"{of}enorm.weight": made.enorm, f"{of}hnorm.weight": made.hnorm, f"{of}eh_proj.weight": made.eh_proj}
    head |= {f"{of}shared_head.norm.weight": own["model.norm.weight"]}
    shared = made.model.state_dict()
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    head |= {of + name: shared[source].clone() for name, source in copies.items()}
    save_tensors(made.folder, {**tensors_of(made.folder), **head})
    set_keys(made.folder / "config.json", num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def made(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _make(tmp_path_factory.mktemp("mtp") / "checkpoint", tiny_r1)


@pytest.fixture(scope="module")
def bundle(made: Made) -> Path:
    changes = ["speculation=mtp", "context_length=64"]
    plans = toolkit.plan(
        "cpu", checkpoint=made.folder, out=made.folder.with_name("b"), precision="fp32", changes=changes
    )
    return toolkit.export(plans)[0]


@pytest.fixture(scope="module")
def opened(bundle: Path) -> OpenModel:
    return open_model(bundle)


def _states(bundle: Path, ids: list[int]) -> NDArray[np.float32]:
    """The hidden states [T, D] that the bundle's graph gives its head."""
    session = ort.InferenceSession(bundle / "model.onnx")
    feeds = {names.INPUT_IDS: np.array([ids]), names.ATTENTION_MASK: np.ones((1, len(ids)), np.int64)}
    (states,) = session.run([names.HIDDEN_STATES], {**feeds, **_no_cache(session)})
    return np.asarray(states[0])


def _no_cache(session: ort.InferenceSession) -> dict[str, NDArray[np.float32]]:
    past = [value for value in session.get_inputs() if names.is_past(value.name)]
    return {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in past}


def test_the_head_computes_the_paper_s_equations(made: Made, bundle: Path) -> None:
    ids = [*PROMPTS[1], *PROMPTS[2]]
    states = made.hidden(ids)
    np.testing.assert_allclose(_states(bundle, ids), states, atol=1e-3)
    session = ort.InferenceSession(bundle / "draft.model.onnx")
    for length in (1, 2, len(ids) - 1):
        tokens, before = ids[1 : length + 1], states[:length]
        logits, further = made.drafts(tokens, before)
        feeds = {
            names.INPUT_IDS: np.array([tokens]),
            names.ATTENTION_MASK: np.ones((1, length), np.int64),
            names.HIDDEN_STATES: before[None].numpy(),
        }
        found = session.run([names.LOGITS, names.HIDDEN_STATES_OUT], {**feeds, **_no_cache(session)})
        np.testing.assert_allclose(found[0][0, -1], logits[-1], atol=2e-3)
        np.testing.assert_allclose(found[1][0], further, atol=1e-3)


@pytest.mark.parametrize("guesses", [1, 3])
def test_greedy_tokens_are_the_same_with_an_mtp_head(guesses: int, made: Made, bundle: Path, opened: OpenModel) -> None:
    looked_at = right = 0
    expected_looked_at = expected_right = 0
    for prompt in PROMPTS:
        expected = greedy_by_genai(bundle, prompt, len(prompt) + NEW_TOKENS)[len(prompt) :]
        params = og.GeneratorParams(opened.model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + NEW_TOKENS)
        params.set_speculative_options(max_draft_tokens=guesses)
        generator = opened.fresh(params)
        generator.append_tokens(prompt)
        found = [token for token, _ in opened.steps(generator, NEW_TOKENS)]
        assert found == expected
        counted = opened.guesses(generator, len(found))
        assert counted is not None
        looked_at, right = looked_at + counted.evaluated, right + counted.accepted
        trials, hits = made.counted(prompt, expected)
        expected_looked_at, expected_right = expected_looked_at + trials, expected_right + hits
    assert 0 < right < looked_at
    if guesses == 1:
        assert expected == made.greedy(PROMPTS[-1], len(expected))
        assert (looked_at, right) == (expected_looked_at, expected_right)


def test_a_cache_of_latents_is_taken_back_where_a_guess_was_wrong(made: Made) -> None:
    told, out = ["speculation=mtp", "context_length=64", "profile=latent-cache"], made.folder.with_name("latents")
    (bundle,) = toolkit.export(toolkit.plan("cpu", checkpoint=made.folder, out=out, precision="fp32", changes=told))
    opened, prompt = open_model(bundle), PROMPTS[1]
    generator = opened.generator(prompt, 20, do_sample=False)
    found = [token for token, _ in opened.steps(generator, 20)]
    counted = opened.guesses(generator, 20)
    assert counted is not None and counted.accepted < counted.evaluated
    assert found == made.greedy(prompt, 20)


def test_no_fold_changes_the_hidden_states_that_a_head_takes(made: Made, tmp_path: Path) -> None:
    """A salient channel would go from the final norm into the LM head's columns."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "salient"))
    tensors = tensors_of(folder)
    tensors["model.norm.weight"][3] *= 50
    tensors["lm_head.weight"][:, 3] /= 50
    save_tensors(folder, tensors)
    opened = open_checkpoint(folder)
    wish = Wish(planned_specs(opened.config, recipe_for("cpu"), CPU_FORM), Rounding.INT8, Rounding.INT8, True, False)
    for folds in (True, False):
        asked = replace(wish, folds_head=folds)
        found = survey(opened.config, opened.source, PROMPTS, asked, tmp_path / f"survey-{folds}")
        assert (found.inputs["lm_head"].fold.scales is not None) == folds


def test_what_guesses_is_told_and_what_cannot_be_guessed_is_written_without(bundle: Path) -> None:
    told = measure_speed(bundle, 8, 16, 1).speculation
    # A wrong guess costs a run of its own: the model reads the token before it anew.
    assert told is not None and told.method == "mtp" and 0 <= told.acceptance_rate <= 1
    assert told.tokens_per_run >= 0.5
    model = TextModel(bundle)
    for alternatives in (None, 2):
        pieces = model.pieces("Add 4 and 5.", TextOptions(max_new_tokens=6, alternatives=alternatives))
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                assert (end.value.speculation is None) == (alternatives is not None)
                break


def test_the_head_s_files_are_the_bundle_s(bundle: Path) -> None:
    assert not verify_manifest(bundle)
    assert not lint_bundle(bundle)
    listed = {entry.name for entry in read_manifest(bundle).files}
    assert {"draft.model.onnx", "draft.model.onnx.data", SPECULATION_FILE} <= listed
    # Releases that do not read the file see no key that they do not know.
    decoder = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    assert names.HIDDEN_STATES not in decoder["outputs"]
    with pytest.raises(BundleError, match="b-mtp is an MTP head, which guesses for its model's bundle"):
        open_model(bundle.with_name("b-mtp"))


def test_a_model_is_converted_without_its_head_and_the_head_s_place_is_told(made: Made) -> None:
    checkpoint = open_checkpoint(made.folder)
    said = f"layer {LAYERS} predicts one token more (MTP): --set speculation=mtp has it guess for cpu"
    assert said in checkpoint.notes
    assert not any(name.startswith(f"model.layers.{LAYERS}.") for name in checkpoint.source.names())
    head = mtp_checkpoint(checkpoint)
    assert {"model.layers.0.eh_proj.weight", "model.norm.weight", "lm_head.weight"} <= set(head.source.names())


def test_a_head_in_fp8_is_read_as_the_rest_of_the_checkpoint_is(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.folder, tmp_path / "fp8"))
    floats = quantize_folder(folder, fp8_blocks((128, 128)), BLOCKS, left=("mlp.gate.",))
    head = mtp_checkpoint(open_checkpoint(folder)).source
    for name in ("eh_proj.weight", "self_attn.kv_b_proj.weight", "mlp.experts.5.down_proj.weight"):
        np.testing.assert_array_equal(head.read(f"model.layers.0.{name}"), floats[f"model.layers.{LAYERS}.{name}"])
    assert head.digests()[0].name == "model.safetensors"


def test_a_checkpoint_without_a_head_is_refused(made: Made, tiny_r1: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="this qwen2 has none, expected num_nextn_predict_layers"):
        toolkit.plan("tiny-r1-cpu", changes=["speculation=mtp"], out=tmp_path / "b")
    folder = Path(shutil.copytree(made.folder, tmp_path / "cut"))
    kept = {name: value for name, value in tensors_of(folder).items() if "enorm" not in name}
    save_tensors(folder, kept)
    with pytest.raises(
        CheckpointError, match=r"has no model\.layers\.3\.enorm\.weight, which its config\.json promises"
    ):
        toolkit.plan("cpu", checkpoint=folder, changes=["speculation=mtp"], out=tmp_path / "b")
