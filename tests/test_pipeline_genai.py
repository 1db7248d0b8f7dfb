"""Pipelines through onnxruntime-genai: the reference's tokens at every prompt length, turns, limits and refusals."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.command_line import called, run
from tests.exports import Exports
from tests.graphs import EIGHT_BITS, export_bundle
from tests.prompts import NEW_TOKENS, prompt_lengths, prompt_of, reference_tokens
from toolkit.bundle.settings import read_genai_config, read_settings
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.errors import MachineError
from toolkit.evaluate import providers, session
from toolkit.evaluate.conversation import Conversation
from toolkit.evaluate.positions import open_positions
from toolkit.evaluate.session import OpenModel, continuations, open_model
from toolkit.evaluate.speed import measure_speed
from toolkit.pipeline import plan
from toolkit.pipeline.export import Order, check_exports, export_bundles, plan_exports
from toolkit.recipe import load_recipe
from toolkit.reference.decoder import reference_logits
from toolkit.target import TARGETS

WINDOWS = (8, 64)
# fp32 bundles by (target, window); what is one graph is given the prompts around 64.
BUNDLES = [(name, window) for name, row in TARGETS.items() for window in (WINDOWS if row.partitioned else (64,))]
# fp32 bundles whose transformer is split, by (target, parts).
SPLIT = [("qnn", 2), ("qnn", 4), ("cpu-split", 3), ("openvino", 2), ("vitisai", 2)]
# What each accelerator's provider is called, and what to install for it.
PROVIDERS = {
    name: (row.accelerator.execution_provider, row.accelerator.package)
    for name, row in TARGETS.items()
    if row.accelerator.provider
}
QUESTIONS = tuple(f"Add {4 + 6 * k} and {5 + 2 * k}." for k in range(6))


@pytest.fixture(scope="session")
def reference(tiny_r1: Path) -> dict[int, list[int]]:
    """The reference's greedy tokens after each prompt, by its length."""
    lengths = sorted({length for window in WINDOWS for length in prompt_lengths(window)})
    return dict(zip(lengths, reference_tokens(tiny_r1, [prompt_of(n) for n in lengths], NEW_TOKENS), strict=True))


@pytest.fixture(scope="session")
def fp32(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    folder = tmp_path_factory.mktemp("fp32")
    orders = {}
    for target, window in BUNDLES:
        changes = [f"window={window}"] if window != 64 else []
        orders[target, window] = Order(load_recipe(f"tiny-r1-{target}", changes), folder / f"{target}-{window}")
    return dict(zip(orders, export_bundles(list(orders.values()), open_checkpoint(tiny_r1), "fp32"), strict=True))


@pytest.fixture(scope="session")
def split(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    folder = tmp_path_factory.mktemp("split")
    orders = {
        (target, parts): Order(load_recipe(f"tiny-r1-{target}", [f"parts={parts}"]), folder / f"{target}-{parts}")
        for target, parts in SPLIT
    }
    return dict(zip(orders, export_bundles(list(orders.values()), open_checkpoint(tiny_r1), "fp32"), strict=True))


@pytest.fixture(scope="session")
def quantized(exports: Exports) -> dict[str, Path]:
    return {target: exports(target) for target in ("cpu-split", *PROVIDERS)}


def _made(generator: Any, new_tokens: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < new_tokens and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


@pytest.mark.parametrize("window", WINDOWS)
def test_the_prompts_are_worth_asking(reference: dict[int, list[int]], window: int) -> None:
    """Few continuations end early, and no two are the same."""
    made = [reference[length] for length in prompt_lengths(window)]
    assert sum(len(tokens) >= 10 for tokens in made) >= 5
    assert len({tuple(tokens[:5]) for tokens in made}) == len(made)


@pytest.mark.parametrize(("target", "window"), BUNDLES)
def test_genai_decodes_what_the_reference_decodes(
    fp32: dict[tuple[str, int], Path], reference: dict[int, list[int]], target: str, window: int
) -> None:
    lengths = prompt_lengths(window)
    made = continuations(fp32[target, window], [prompt_of(n) for n in lengths], NEW_TOKENS, on_cpu=target in PROVIDERS)
    assert dict(zip(lengths, made, strict=True)) == {length: reference[length] for length in lengths}


@pytest.mark.parametrize(("target", "parts"), SPLIT)
def test_parts_decode_what_the_reference_decodes(
    split: dict[tuple[str, int], Path], reference: dict[int, list[int]], target: str, parts: int
) -> None:
    lengths, bundle = prompt_lengths(64), split[target, parts]
    stages = [f"{kind}_{part}" for kind in ("context", "iterator") for part in range(parts)]
    (pipeline,) = read_genai_config(bundle)["model"]["decoder"]["pipeline"]
    assert list(pipeline) == ["embeddings", *stages, "lm_head"]
    made = continuations(bundle, [prompt_of(n) for n in lengths], NEW_TOKENS, on_cpu=target in PROVIDERS)
    assert dict(zip(lengths, made, strict=True)) == {length: reference[length] for length in lengths}


def test_quantized_parts_decode_what_one_part_decodes(
    quantized: dict[str, Path], tiny_r1: Path, tmp_path: Path
) -> None:
    """But for float16 between them, where a single graph on the CPU keeps float32. The weights are the same file."""
    recipe = load_recipe("tiny-r1-qnn", ["parts=2", *EIGHT_BITS])
    parts = export_bundle(recipe, open_checkpoint(tiny_r1), tmp_path / "parts")
    data = "transformer.onnx.data"
    assert (parts / data).read_bytes() == (quantized["qnn"] / data).read_bytes()
    ids = prompt_of(131)
    made, whole = (open_positions(bundle).logits(ids, 100) for bundle in (parts, quantized["qnn"]))
    assert 0 < np.sqrt(((made - whole) ** 2).mean()) / whole.std() < 0.01
    assert (made.argmax(axis=-1) == whole.argmax(axis=-1)).mean() > 0.95


@pytest.mark.parametrize("window", WINDOWS)
def test_prompt_and_answer_may_fill_the_context(fp32: dict[tuple[str, int], Path], tiny_r1: Path, window: int) -> None:
    """A prompt of whole windows, and as many new tokens as the cache has left."""
    prompt = prompt_of(1024 - window)
    (made,) = continuations(fp32["cpu-split", window], [prompt], window)
    assert made == reference_tokens(tiny_r1, [prompt], window)[0]


@pytest.mark.parametrize("position", [0, 20, 68])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_pad_inside_the_prompt_gives_wrong_tokens(
    fp32: dict[tuple[str, int], Path], tiny_r1: Path, window: int, position: int
) -> None:
    """All but the first, on every release measured: so the pad must be an id that no text holds."""
    bundle, prompt = fp32["cpu-split", window], prompt_of(70)
    (right,) = continuations(bundle, [prompt], NEW_TOKENS)
    assert right == reference_tokens(tiny_r1, [prompt], NEW_TOKENS)[0]
    prompt[position] = read_genai_config(bundle)["model"]["pad_token_id"]
    (made,), (expected,) = continuations(bundle, [prompt], NEW_TOKENS), reference_tokens(tiny_r1, [prompt], NEW_TOKENS)
    assert made[0] == expected[0]
    assert made != expected and len(expected) > 10


@pytest.mark.parametrize("length", [7, 63, 100, 128])
@pytest.mark.parametrize(("target", "window"), [("cpu-split", 8), ("cpu-split", 64), ("cpu", 64)])
def test_a_second_turn_on_one_generator_is_wrong(
    fp32: dict[tuple[str, int], Path], tiny_r1: Path, target: str, window: int, length: int
) -> None:
    """Why Conversation begins each turn anew: the last token made is in the sequence, and the graph never saw it."""
    checkpoint, opened = open_checkpoint(tiny_r1), open_model(fp32[target, window])
    prompt, question = prompt_of(length), prompt_of(30)
    generator = opened.generator(prompt, 400, do_sample=False)
    answer = _made(generator, 5)
    assert answer == reference_tokens(tiny_r1, [prompt], 5)[0]
    generator.append_tokens(question)
    whole = prompt + answer + question
    fresh = opened.generator(whole, NEW_TOKENS, do_sample=False)
    (logits,) = reference_logits(checkpoint.config, checkpoint.source, [whole])
    assert np.abs(fresh.get_logits().reshape(-1) - logits[-1]).max() <= 1e-3
    assert np.abs(generator.get_logits().reshape(-1) - logits[-1]).max() > 0.1
    (expected,) = reference_tokens(tiny_r1, [whole], NEW_TOKENS)
    assert _made(fresh, NEW_TOKENS) == expected
    assert _made(generator, NEW_TOKENS) != expected


def test_one_graph_takes_a_prompt_in_two_parts(fp32: dict[tuple[str, int], Path], tiny_r1: Path) -> None:
    """So that it is the token made between them that a second turn lacks."""
    generator = open_model(fp32["cpu", 64]).generator(prompt_of(20), 200, do_sample=False)
    generator.append_tokens(prompt_of(30))
    assert _made(generator, NEW_TOKENS) == reference_tokens(tiny_r1, [prompt_of(20) + prompt_of(30)], NEW_TOKENS)[0]


def _written(conversation: Conversation, question: str) -> str:
    """The answer as the model writes it, thought and markers included."""
    return "".join(conversation.ask(question))


def test_each_turn_is_what_a_fresh_conversation_answers(
    fp32: dict[tuple[str, int], Path], tiny_r1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = fp32["cpu-split", 64]
    prompts: list[list[int]] = []
    generator = OpenModel.generator

    def noting(opened: OpenModel, prompt: Any, *args: Any, **options: Any) -> Any:
        prompts.append([int(i) for i in prompt])
        return generator(opened, prompt, *args, **options)

    monkeypatch.setattr(OpenModel, "generator", noting)
    conversation = Conversation(bundle, 200)
    answers = [_written(conversation, question) for question in QUESTIONS]
    assert len(set(answers)) == len(QUESTIONS)
    # Each turn's prompt holds all of the one before, and what was answered to it.
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    for turn, (prompt, answer) in enumerate(zip(prompts, reference_tokens(tiny_r1, prompts, 200), strict=True)):
        assert tokenizer.decode(answer).strip() == answers[turn].strip()
        text = tokenizer.decode(prompt)
        assert all(question in text for question in QUESTIONS[: turn + 1])
        assert all(earlier.partition("</think>")[2].strip() in text for earlier in answers[:turn])
        assert not any(earlier.partition("</think>")[0].strip() in text for earlier in answers[:turn])
    # More than a window, so that answers depend on the cache between windows.
    assert len(prompts[0]) < 64 < len(prompts[-1])
    for turn, question in enumerate(QUESTIONS):
        fresh = Conversation(bundle, 200)
        for asked, answered in zip(QUESTIONS[:turn], answers, strict=False):
            said = answered.partition("</think>")[2].strip()
            fresh._messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        assert _written(fresh, question) == answers[turn]


@pytest.mark.parametrize("target", ["cpu-split", *PROVIDERS])
def test_no_pad_in_an_answer(quantized: dict[str, Path], target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor among the tokens it is made of: the head gives it no chance."""
    pad = read_genai_config(quantized[target])["model"]["pad_token_id"]
    seen: list[Any] = []
    generator = OpenModel.generator

    def noting(opened: OpenModel, prompt: Any, *args: Any, **options: Any) -> Any:
        seen.append((generator(opened, prompt, *args, **options), len(prompt)))
        return seen[-1][0]

    monkeypatch.setattr(OpenModel, "generator", noting)
    answer = _written(Conversation(quantized[target], 200, on_cpu=target in PROVIDERS), "Add 4 and 5.")
    ((made, length),) = seen
    window = read_genai_config(quantized[target])["model"]["decoder"].get("sliding_window", {}).get("window_size", 1)
    tokens = [int(i) for i in made.get_sequence(0)][-(-length // window) * window :]
    assert len(tokens) > 10 and pad not in tokens and answer.strip().endswith("9")
    word = Tokenizer.from_file(str(quantized[target] / "tokenizer.json")).id_to_token(pad)
    assert word is None or word not in answer


@pytest.mark.parametrize(
    ("target", "window", "prompt", "new", "expected"),
    [
        ("cpu-split", 64, 9, 20, 84),
        ("cpu-split", 64, 1, 0, 64),
        ("cpu-split", 64, 64, 20, 84),
        ("cpu-split", 64, 65, 20, 148),
        ("cpu-split", 64, 960, 64, 1024),
        ("cpu-split", 64, 961, 64, 1024),
        ("cpu-split", 64, 9, 2000, 1024),
        ("cpu-split", 8, 9, 20, 36),
        ("openvino", 8, 8, 20, 28),
        ("dml", 64, 9, 20, 29),
        ("cpu", 64, 1000, 100, 1024),
    ],
)
def test_max_length_counts_whole_windows(
    fp32: dict[tuple[str, int], Path], target: str, window: int, prompt: int, new: int, expected: int
) -> None:
    assert read_settings(fp32[target, window]).length_for(prompt, new) == expected


@pytest.mark.parametrize("target", PROVIDERS)
def test_a_bundle_without_its_provider_says_what_to_do(
    quantized: dict[str, Path], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider, package = PROVIDERS[target]
    # As on a machine without the plugin, which may be installed here.
    for plugin in ("onnxruntime_qnn", "onnxruntime_ep_webgpu"):
        monkeypatch.setitem(sys.modules, plugin, None)
    with pytest.raises(MachineError, match=f"no {provider} with its device, .*{re.escape(package)}.*--on-cpu"):
        open_model(quantized[target])
    words = ["generate", str(quantized[target]), "--prompt", "Add 4 and 5."]
    refused = called(*words)
    last = refused.stderr.splitlines()[-1]
    assert refused.returncode == 2 and refused.stdout == ""
    assert last.startswith("error: ") and all(word in last for word in (provider, package, "--on-cpu"))
    done = called(*words, "--on-cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("9")


@pytest.mark.parametrize("built_with_dml", [True, False])
def test_directml_is_where_genai_was_built_with_it(built_with_dml: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packages carry an ONNX Runtime of their own, so the installed `onnxruntime` says nothing of it."""
    monkeypatch.setattr("onnxruntime_genai.is_dml_available", lambda: built_with_dml)
    assert providers.provider_is_here("dml") == built_with_dml


@pytest.mark.skipif(sys.platform != "linux", reason="where QnnHtp.dll may be found")
def test_a_provider_that_takes_no_node_is_not_passed_over(quantized: dict[str, Path]) -> None:
    pytest.importorskip("onnxruntime_qnn")
    # In a process of its own: a plugin stays registered.
    done = run("generate", str(quantized["qnn"]), "--prompt", "Add 4 and 5.")
    assert done.returncode == 2 and "--on-cpu" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("target", ["cpu-split", "qnn", "cpu"])
def test_a_cache_beyond_free_memory_is_refused_at_opening(
    fp32: dict[tuple[str, int], Path], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Keys and values of 1024 tokens in 4 layers of 2 kv heads, 64 wide, float32.
    needed = 2 * 1024 * 4 * 2 * 64 * 4
    monkeypatch.setattr(session, "free_memory_bytes", lambda: needed)
    open_model(fp32[target, 64], on_cpu=True)
    monkeypatch.setattr(session, "free_memory_bytes", lambda: needed - 1)
    with pytest.raises(MachineError, match=r"KV cache of 1024 tokens takes 0\.0 GiB and 0\.0 GiB are free.*context_le"):
        open_model(fp32[target, 64], on_cpu=True)
    with pytest.raises(MachineError, match="GiB"):
        measure_speed(fp32[target, 64], 8, 8, 1, on_cpu=True)


@pytest.mark.parametrize(
    ("target", "window", "bytes_a_token"), [("cpu-split", 64, 4096), ("cpu-split", 256, 4096), ("qnn", 64, 2048)]
)
@pytest.mark.parametrize("share", [0.999, 0.6, 0.51])
def test_a_cache_beyond_the_machine_is_refused_with_a_context_that_fits(
    tiny_r1: Path,
    target: str,
    window: int,
    bytes_a_token: int,
    share: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, ram = open_checkpoint(tiny_r1), int(1024 * bytes_a_token * share)
    monkeypatch.setattr(plan, "ram_bytes", lambda: ram)
    recipe = load_recipe(f"tiny-r1-{target}", [f"window={window}", *EIGHT_BITS])
    order = Order(recipe, tmp_path / "b")
    with pytest.raises(MachineError, match=r"KV cache of 1024 tokens is .* GiB, .* --set context_length=\d+$") as said:
        export_bundles([order], checkpoint)
    assert list(tmp_path.iterdir()) == []
    fits = int(re.findall(r"\d+$", str(said.value))[0])
    assert 0 < fits < 1024 and fits % window == 0 and fits * bytes_a_token <= ram
    smaller = load_recipe(f"tiny-r1-{target}", [f"window={window}", f"context_length={fits}", *EIGHT_BITS])
    check_exports(plan_exports([replace(order, recipe=smaller)], checkpoint))
    if share == 0.6:  # and made once
        bundle = export_bundle(smaller, checkpoint, tmp_path / "b")
        assert read_genai_config(bundle)["search"]["max_length"] == fits
    monkeypatch.setattr(plan, "ram_bytes", lambda: 1024 * bytes_a_token)
    check_exports(plan_exports([order], checkpoint))


@pytest.mark.parametrize(
    ("recipe", "window", "message"),
    [
        ("tiny-r1-cpu-split", "48", "window 48 does not divide context_length 1024.*context_length=1008"),
        ("tiny-r1-cpu-split", "2048", "does not divide"),
        ("tiny-r1-cpu-split", "0", "needs one of at least 2"),
        ("tiny-r1-qnn", "1", "expected at least 2"),
        ("tiny-r1-openvino", "eight", "expected a token count"),
        ("tiny-r1-cpu", "64", "target cpu has no context stage"),
        ("tiny-r1-dml", "64", "target dml has no context stage"),
    ],
)
def test_a_window_that_cannot_be_is_refused(recipe: str, window: str, message: str, tmp_path: Path) -> None:
    done = called("export", recipe, "--out", str(tmp_path / "b"), "--set", f"window={window}", "--no-validate")
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and re.search(message, line)
