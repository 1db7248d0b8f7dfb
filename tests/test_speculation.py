"""Speculation: guesses change how many tokens a run writes, and no token; a draft comes with its bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
import pytest

import toolkit
from tests.exports import Exports
from tests.graphs import EIGHT_BITS
from tests.prompts import prompt_of
from toolkit import names
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.manifest import read_manifest, verify_manifest
from toolkit.bundle.speculative import SPECULATION_FILE
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.vocabulary import check_same_words, widen_vocabulary
from toolkit.errors import RecipeError, UnsupportedError
from toolkit.evaluate.positions import open_positions
from toolkit.evaluate.session import open_model
from toolkit.evaluate.speed import measure_speed
from toolkit.pipeline.draft import attach_draft
from toolkit.pipeline.plan import ExportPlan, plan_export
from toolkit.recipe import load_recipe
from toolkit.speculation import CHECKED_ROWS

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def drafted(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-r1 with itself for its draft, by one call."""
    return toolkit.export(_plans(tmp_path_factory.mktemp("drafted") / "tiny-r1-cpu"))[0]


def _plans(out: Path) -> list[ExportPlan]:
    return toolkit.plan("tiny-r1-cpu", quality="fast", out=out, draft="tiny-r1", precision="fp32")


def _texts(bundle: Path, overlay: str | None, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """onnxruntime-genai's own greedy tokens after each prompt, and the share of its guesses that were right."""
    config = og.Config(str(bundle))
    if overlay is not None:
        config.overlay(overlay)
    model, made, right, seen = og.Model(config), [], 0, 0
    for prompt in prompts:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + NEW_TOKENS)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        made.append([int(token) for token in generator.get_sequence(0)[len(prompt) :]])
        counted = generator.get_speculative_stats() if overlay else {}
        right += int(counted.get("draft_tokens_accepted", 0))
        seen += int(counted.get("draft_tokens_evaluated", 0))
    return made, right / max(seen, 1)


def test_greedy_tokens_are_the_same_with_a_draft(exports: Exports, tmp_path: Path) -> None:
    """tiny-r1 in float32, and rounded for its draft, so that some guesses are wrong."""
    bundle = exports.copy(tmp_path / "bundle", "cpu", (*EIGHT_BITS, "speculation=ngram"), "fp32")
    attach_draft(bundle, exports("cpu", ("quality=fast", "bits_per_weight=0")))
    prompts = [prompt_of(length) for length in range(1, 40, 13)]
    plain, _ = _texts(bundle, None, prompts)
    guessed, share = _texts(bundle, (bundle / SPECULATION_FILE).read_text(encoding="utf-8"), prompts)
    assert guessed == plain
    assert 0.3 < share < 1


def test_greedy_tokens_are_the_same_with_ngrams(exports: Exports) -> None:
    bundle = exports("cpu", (*EIGHT_BITS, "speculation=ngram"), "fp32")
    # A text that repeats itself, so that there is something to guess.
    prompts = [prompt_of(length) * 3 for length in range(4, 10)]
    plain, _ = _texts(bundle, None, prompts)
    guessed, share = _texts(bundle, (bundle / SPECULATION_FILE).read_text(encoding="utf-8"), prompts)
    assert guessed == plain
    assert 0 < share < 1


def test_logits_of_the_last_rows_are_the_model_s(exports: Exports) -> None:
    """Of a batch of unequal lengths too, padded at the right; further positions are zeros."""
    changes = (*EIGHT_BITS, "speculation=ngram")
    bundle, plain = exports("cpu", changes, "fp32"), exports("cpu", EIGHT_BITS, "fp32")
    whole = open_positions(plain).logits(prompt_of(50))
    session = ort.InferenceSession(bundle / "model.onnx")
    feeds = {
        value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if names.is_past(value.name)
    }
    mask = np.ones((2, 50), np.int64)
    mask[1, 30:] = 0
    ids = np.array([prompt_of(50)] * 2, np.int64)
    (made,) = session.run([names.LOGITS], {**feeds, names.INPUT_IDS: ids, names.ATTENTION_MASK: mask})
    np.testing.assert_allclose(made[0, 50 - CHECKED_ROWS :], whole[50 - CHECKED_ROWS :], atol=1e-4)
    np.testing.assert_allclose(made[1, 30 - CHECKED_ROWS : 30], whole[30 - CHECKED_ROWS : 30], atol=1e-4)
    assert not made[:, : 30 - CHECKED_ROWS].any()
    # What judges a bundle sees every position of the very graph.
    np.testing.assert_allclose(open_positions(bundle).logits(prompt_of(50)), whole, atol=1e-4)


def test_a_draft_s_files_are_the_bundle_s(drafted: Path) -> None:
    assert not verify_manifest(drafted)
    assert not lint_bundle(drafted)
    listed = {entry.name for entry in read_manifest(drafted).files}
    assert {"draft.model.onnx", "draft.model.onnx.data", SPECULATION_FILE} <= listed
    assert (drafted / "draft.model.onnx.data").samefile(drafted.with_name("tiny-r1-cpu-draft") / "model.onnx.data")
    before = (drafted / "manifest.json").stat().st_mtime_ns
    notes: list[str] = []
    toolkit.export(_plans(drafted), note=notes.append)
    assert len([line for line in notes if "kept" in line]) == 2
    assert (drafted / "manifest.json").stat().st_mtime_ns == before


def test_what_guesses_is_told(drafted: Path) -> None:
    assert open_model(drafted).speculation == "draft"
    told = measure_speed(drafted, 8, 16, 2).speculation
    assert told is not None
    assert told.method == "draft"
    assert 0 < told.acceptance_rate <= 1 < told.tokens_per_run <= 5
    answer = toolkit.generate(drafted, "Add 4 and 5.", 30)
    assert answer.speculation is not None
    assert answer.speculation.tokens_per_run > 1


def test_check_finds_a_draft_of_other_logits_and_a_graph_without_rows(exports: Exports, tmp_path: Path) -> None:
    bundle = exports.copy(tmp_path / "bundle", "cpu")
    (bundle / SPECULATION_FILE).write_text(json.dumps({"speculative": {"ngram_size": 3}}), encoding="utf-8")
    assert lint_bundle(bundle) == [
        "speculation.json guesses tokens, and the graph gives logits of the last position alone"
    ]
    lost = {"speculative": {}, "model": {"draft": {"filename": "draft.model.onnx"}}}
    (bundle / SPECULATION_FILE).write_text(json.dumps(lost), encoding="utf-8")
    (problem,) = lint_bundle(bundle)
    assert "names draft.model.onnx, which is no file of the bundle" in problem


def test_added_ids_never_win(tiny_r1: Path) -> None:
    opened = open_checkpoint(tiny_r1)
    rows = opened.config.vocab_size
    wide = widen_vocabulary(opened, rows + 5)
    for name in ("model.embed_tokens.weight", *(n for n in opened.source.names() if n == "lm_head.weight")):
        own = opened.source.read(name)
        expected = np.concatenate([own, np.repeat(own[-1:], 5, axis=0)])
        np.testing.assert_array_equal(wide.source.read(name), expected)
        np.testing.assert_array_equal(wide.source.read_rows(name, rows - 2, rows + 3), expected[rows - 2 : rows + 3])
        made = np.empty_like(expected)
        for piece in wide.source.scan(1 << 16):
            if piece.name == name:
                made[piece.start : piece.stop] = wide.source.decode(piece, piece.start, piece.stop)
            piece.release()
        np.testing.assert_array_equal(made, expected)
    with pytest.raises(RecipeError, match=f"the draft has {rows} ids and the model {rows - 1}"):
        widen_vocabulary(opened, rows - 1)


def test_a_draft_of_another_tokenizer_is_refused(tiny_r1: Path, stories260k: Path) -> None:
    model, other = open_checkpoint(tiny_r1), open_checkpoint(stories260k)
    with pytest.raises(RecipeError, match=r"the draft stories260k has another tokenizer than the model: .* is id \d+"):
        check_same_words(model, other)
    check_same_words(model, open_checkpoint(tiny_r1))


@pytest.mark.parametrize(
    ("target", "change", "said"),
    [
        ("cpu", "speculation=eagle", "speculation 'eagle' is unknown, expected none or ngram or draft or mtp"),
        ("cpu", "speculation=draft", "draft is '', and speculation draft needs a smaller model"),
        ("cpu", "draft=tiny-r1", "draft is 'tiny-r1', and speculation none has no use for one"),
        ("cpu-split", "speculation=ngram", "target cpu-split is a pipeline, where guesses cannot be checked"),
        ("qnn", "speculation=ngram", "target qnn is a pipeline, where guesses cannot be checked"),
        ("dml", "speculation=ngram", "target dml reads several tokens as a prompt of their own, where guesses"),
    ],
)
def test_what_cannot_be_is_refused(target: str, change: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(f"tiny-r1-{target}", [change])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_cache_of_latents_checks_no_guesses() -> None:
    with pytest.raises(RecipeError, match="a cache of latents is copied at every token"):
        load_recipe("deepseek-v2-lite-cpu", ["speculation=ngram", "profile=latent-cache"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size, with which onnxruntime-genai guesses nothing"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1, which onnxruntime-genai counts otherwise for guesses"),
    ],
)
def test_sampling_that_guesses_cannot_follow_is_refused(
    setting: dict[str, Any], said: str, tiny_r1: Path, tmp_path: Path
) -> None:
    opened = open_checkpoint(tiny_r1)
    sampling = replace(opened.side.generation.sampling, **setting)
    side = replace(opened.side, generation=replace(opened.side.generation, sampling=sampling))
    recipe = load_recipe("tiny-r1-cpu", ["speculation=ngram"])
    with pytest.raises(UnsupportedError, match=said):
        plan_export(recipe, replace(opened, side=side), tmp_path / "bundle", "int4")
