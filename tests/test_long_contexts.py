"""Contexts beyond what a cache is allocated for unasked: prompts in chunks, longer requests, answers that are cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import called
from tests.exports import Exports
from tests.prompts import prompt_of
from toolkit.bundle.genai_config import unasked_length
from toolkit.bundle.settings import read_genai_config
from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.errors import MachineError
from toolkit.evaluate import session
from toolkit.evaluate.session import continuations, open_model
from toolkit.pipeline.described import describe
from toolkit.pipeline.plan import plan_export
from toolkit.recipe import load_recipe
from toolkit.target import LONG_CONTEXT, TARGETS

GROWING = [name for name, row in TARGETS.items() if row.context_length == LONG_CONTEXT]


def test_what_is_one_graph_has_a_long_context() -> None:
    assert GROWING == [name for name, row in TARGETS.items() if not row.partitioned]


@pytest.mark.parametrize("target", GROWING)
def test_a_long_context_costs_a_plan_what_is_allocated_unasked(target: str, tmp_path: Path) -> None:
    """The 1.5B: keys and values of 28 layers of 256 channels, four times as many as of 4,096 tokens."""
    recipe = load_recipe(f"1.5b-{target}")
    facts = recipe.facts()
    assert facts is not None and recipe.context_length == 16384
    plan = plan_export(recipe, synthetic_checkpoint(facts), tmp_path / "b", "int4")
    item = 4 if target == "cpu" else 2
    assert plan.kv_cache_bytes == 2 * 28 * 256 * 16384 * item == 4 * plan.opened_cache_bytes


@pytest.mark.parametrize(
    ("context", "is_pipeline", "expected"), [(16384, False, 4096), (1024, False, 1024), (8192, True, 8192)]
)
def test_an_app_that_does_not_say_gets_so_much(context: int, is_pipeline: bool, expected: int) -> None:
    assert unasked_length(context, is_pipeline) == expected


def test_a_prompt_in_chunks_is_the_prompt(exports: Exports, tmp_path: Path) -> None:
    """600 tokens in chunks of 512, as bundles for the CPU say, of 7, and at once."""
    bundle = exports.copy(tmp_path / "b", "cpu")
    config = read_genai_config(bundle)
    assert config["search"]["chunk_size"] == 512 and "chunk_size" not in read_genai_config(exports("dml"))["search"]
    made = []
    for chunk in (512, 7, 0):
        config["search"] |= {"chunk_size": chunk} if chunk else {}
        if not chunk:
            del config["search"]["chunk_size"]
        (bundle / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
        made.append(continuations(bundle, [prompt_of(600)], 24))
    assert made[0] == made[1] == made[2] and len(made[0][0]) > 5


@pytest.fixture
def short(exports: Exports, tmp_path: Path) -> Path:
    """A bundle whose cache is of 128 tokens unasked, in a context of 1,024."""
    bundle = exports.copy(tmp_path / "b", "cpu")
    config = read_genai_config(bundle)
    config["search"]["max_length"] = 128
    (bundle / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return bundle


def test_a_request_may_be_longer_than_what_is_allocated_unasked(
    short: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt_of(200)]
    assert continuations(short, prompts, 24) == continuations(exports("cpu"), prompts, 24)
    # Keys and values of 4 layers of 2 kv heads, 64 wide, float32.
    token_bytes = 2 * 4 * 2 * 64 * 4
    opened = open_model(short)
    assert opened.token_bytes == token_bytes
    for free, longest in ((1 << 40, 1024), (1000 * token_bytes, 500), (0, 128)):
        monkeypatch.setattr(session, "free_memory_bytes", lambda free=free: free)
        assert opened.longest() == longest
    with pytest.raises(MachineError, match=r"KV cache of 224 tokens takes .* ask for fewer tokens"):
        opened.generator(prompts[0], 24)


def test_what_cuts_an_answer_is_named(exports: Exports, tmp_path: Path) -> None:
    """The limit that was asked for, or the context, here of 40 tokens."""
    bundle = exports.copy(tmp_path / "b", "cpu")
    config = read_genai_config(bundle)
    config["model"]["context_length"] = config["search"]["max_length"] = 40
    (bundle / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ["generate", str(bundle), "--prompt", "Add 4 and 5."]
    by_context, by_limit = called(*words), called(*words, "--max-new-tokens", "3")
    assert "by the end of the bundle's context of 40 tokens" in by_context.stderr
    assert "note: cut after 3 tokens, by --max-new-tokens\n" in by_limit.stderr


@pytest.mark.parametrize(("target", "item"), [("qnn", 2), ("openvino", 2), ("vitisai", 4)])
def test_what_each_context_costs_an_npu(target: str, item: int, tmp_path: Path) -> None:
    """The 1.5B's keys and values are 28 layers of 256 channels, its transformer 1.31 G weights of 4 bits and more."""
    recipe = load_recipe(f"1.5b-{target}")
    facts = recipe.facts()
    assert facts is not None and recipe.context_length == 8192
    contexts = describe(plan_export(recipe, synthetic_checkpoint(facts), tmp_path / "b", "int4")).npu_contexts
    assert contexts is not None
    assert [(row.context_length, row.is_asked) for row in contexts] == [(4096, False), (8192, True), (16384, False)]
    for row in contexts:
        assert row.kv_cache_bytes == 2 * 28 * 256 * row.context_length * item
        assert 1.31e9 / 2 < row.npu_memory_bytes - row.kv_cache_bytes < 1.31e9 / 2 * 1.3


def test_what_has_no_npu_is_not_told_of_one(tmp_path: Path) -> None:
    recipe = load_recipe("1.5b-cpu")
    facts = recipe.facts()
    assert facts is not None
    assert describe(plan_export(recipe, synthetic_checkpoint(facts), tmp_path / "b", "int4")).npu_contexts is None
