"""Which format each matrix gets, what a format weighs, and rules that decide nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from toolkit.algorithms import ALGORITHMS, MatrixUse
from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.errors import RecipeError
from toolkit.pipeline.described import describe
from toolkit.pipeline.plan import plan_export
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks
from toolkit.quant.formats import (
    budget_blocks,
    check_rules,
    idle_rules,
    other_formats,
    planned_specs,
    stored_arrays,
    stored_bytes,
)
from toolkit.recipe import QuantRule, Recipe, load_recipe
from toolkit.target import CPU_FORM, TARGETS

MODELS: Final = Path(__file__).parent.parent / "models"
EVERYTHING: Final = QuantRule("*", block_size=128)


def _config(tied: bool = False) -> ModelConfig:
    return replace(read_config(MODELS / "1.5b"), tie_word_embeddings=tied, num_hidden_layers=2)


def _recipe(*rules: QuantRule, quality: str = "fast") -> Recipe:
    return replace(load_recipe("1.5b-cpu"), name="mine", quantize=rules, quality=quality)


# What GPTQ, the text and the search each serve, spelled out: (asked, bits, use) and what it becomes.
SUITED: Final = (
    ("gptq", 4, MatrixUse.LINEAR, "gptq"),
    ("gptq", 8, MatrixUse.LINEAR, "imatrix"),
    ("gptq", 4, MatrixUse.TIED_EMBEDDING, "gptq"),
    ("gptq", 8, MatrixUse.TIED_EMBEDDING, "imatrix"),
    ("gptq", 4, MatrixUse.EMBEDDING, "kquant"),
    ("gptq", 8, MatrixUse.EMBEDDING, "kquant"),
    ("imatrix", 8, MatrixUse.LINEAR, "imatrix"),
    ("imatrix", 4, MatrixUse.TIED_EMBEDDING, "imatrix"),
    ("imatrix", 4, MatrixUse.EMBEDDING, "kquant"),
    ("kquant", 8, MatrixUse.EMBEDDING, "kquant"),
    ("rtn", 4, MatrixUse.EMBEDDING, "rtn"),
)


@pytest.mark.parametrize(("asked", "bits", "use", "given"), SUITED)
def test_an_algorithm_hands_on_what_it_does_not_serve(asked: str, bits: int, use: MatrixUse, given: str) -> None:
    assert ALGORITHMS[asked].suited(bits, use).name == given


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("signed", [False, True])
def test_every_row_keeps_nearly_all_of_a_matrix(name: str, signed: bool) -> None:
    """A kernel that fills nothing, or fills it for other blocks, loses more than a hundredth of what there is."""
    weight = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    weight[:, 64:128] *= 50
    spec = QuantSpec(8, 64, symmetric=signed, algorithm=name, signed=signed)
    restored = dequantize_blocks(quantize_blocks(weight, spec, np.ones(256, np.float32)), spec, 256)
    for block in range(0, 256, 64):
        columns = slice(block, block + 64)
        assert np.square((restored - weight)[:, columns]).sum() < 0.01 * np.square(weight[:, columns]).sum()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_line_of_fallbacks_ends_without_text(name: str) -> None:
    for use in MatrixUse:
        for bits in (4, 8):
            found = ALGORITHMS[name].suited(bits, use)
            assert bits in found.bits and use in found.used
    assert not ALGORITHMS[name].suited(4, MatrixUse.EMBEDDING).reads_text


@pytest.mark.parametrize("tied", [False, True])
def test_best_solves_four_bits_that_are_multiplied(tied: bool) -> None:
    rules = (QuantRule("*.down_proj", bits=8), QuantRule("*", block_size=32))
    specs = planned_specs(_config(tied), _recipe(*rules, quality="best"), CPU_FORM)
    assert specs["model.layers.0.mlp.down_proj.weight"].algorithm == "imatrix"
    assert specs["model.layers.0.mlp.up_proj.weight"].algorithm == "gptq"
    assert specs["model.embed_tokens.weight"].algorithm == ("gptq" if tied else "kquant")
    assert ("lm_head.weight" in specs) is not tied


def test_a_budget_buys_eight_bits_without_gptq() -> None:
    ways = other_formats(QuantSpec(4, 64, algorithm="gptq"), 256)
    assert {(way.bits, way.algorithm) for way in ways} == {(4, "gptq"), (8, "imatrix")}
    assert {way.block_size for way in ways if way.bits == 4} == {32, 64, 128}


@pytest.mark.parametrize(("rule", "sizes"), [(16, (16, 32, 64, 128)), (64, (32, 64, 128)), (256, (32, 64, 128))])
def test_a_budget_buys_narrow_blocks_anywhere_where_a_rule_has_them(rule: int, sizes: tuple[int, ...]) -> None:
    specs = [QuantSpec(4, 32), QuantSpec(8, 16), QuantSpec(4, rule)]
    assert budget_blocks(specs) == sizes
    ways = other_formats(specs[0], 256, block_sizes=sizes)
    assert {way.block_size for way in ways if way.bits == 4} == set(sizes)
    # Eight bits have no use for them.
    assert {way.block_size for way in ways if way.bits == 8} == {32, 128}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [96, 160, 256])
def test_bytes_of_blocks_are_those_of_the_arrays_that_are_made(bits: int, symmetric: bool, columns: int) -> None:
    spec = QuantSpec(bits, 32, symmetric)
    made = quantize_blocks(np.ones((6, columns), np.float32), spec)
    zeros = 0 if made.zero_points is None else made.zero_points.nbytes
    assert stored_bytes((6, columns), spec, "float32") == made.packed.nbytes + made.scales.nbytes + zeros
    assert stored_bytes((6, columns), spec, "float16") == made.packed.nbytes + made.scales.nbytes // 2 + zeros


def test_bytes_of_signed_integers_are_onnx_int4() -> None:
    """Two int4 a byte, zero points too: 6 rows of one block have 6 zero points in 3 bytes."""
    row = QuantSpec(4, 96, symmetric=True, signed=True)
    assert [array.nbytes for array in stored_arrays((6, 96), row, "float16")] == [6 * 96 // 2, 6 * 2, 3]
    blocks = QuantSpec(4, 32, symmetric=True, signed=True)
    assert [array.nbytes for array in stored_arrays((6, 96), blocks, "float16")] == [6 * 96 // 2, 6 * 3 * 2, 9]
    assert stored_bytes((96,), None, "float16") == 192


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("lm_haed", "rule 1 matches no module: 'lm_haed' (did you mean 'lm_head'?)"),
        ("model.embed_token", "(did you mean 'model.embed_tokens'?)"),
        ("*.dwon_proj", "(did you mean '*.down_proj'?)"),
        ("model.layers.0.mlp.dwon_proj", "(did you mean 'model.layers.0.mlp.down_proj'?)"),
        ("model.layers.*.self_attn.qproj", "(did you mean 'model.layers.*.self_attn.q_proj'?)"),
        ("model.embed_tokens|lm_haed", "rule 1 matches no module: 'lm_haed'"),
        ("model.layers.7.*", "rule 1 matches no module: 'model.layers.7.*'"),
        # Another family's attention has it: beside what this one has it may stand, alone it decides nothing.
        ("*.kv_b_proj", "rule 1 matches no module: '*.kv_b_proj'"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_rule_that_matches_nothing_is_refused_with_the_nearest_name(glob: str, expected: str, tied: bool) -> None:
    with pytest.raises(RecipeError) as refused:
        check_rules(_config(tied), _recipe(QuantRule(glob), EVERYTHING))
    assert expected in str(refused.value)


def test_a_rule_behind_one_that_takes_all_of_it_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"rule 2 \('lm_head'\) decides nothing, since rule 1 \('\*'\) comes before it"
    ):
        check_rules(_config(), _recipe(EVERYTHING, QuantRule("lm_head", bits=8)))
    taken = QuantRule("*.q_proj|*.k_proj"), QuantRule("*.v_proj"), QuantRule("*.q_proj|*.v_proj"), EVERYTHING
    with pytest.raises(RecipeError, match=r"rule 3 .*since rule 1 "):
        check_rules(_config(), _recipe(*taken))
    # What is left for the last rule may be nothing, and part of a rule may be taken.
    check_rules(_config(), _recipe(QuantRule("*_proj"), QuantRule("lm_head|*.embed_tokens"), EVERYTHING))
    check_rules(_config(), _recipe(QuantRule("*.q_proj"), QuantRule("*.q_proj|*.v_proj"), EVERYTHING))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_targets_own_rules_stand_for_tied_checkpoints_and_others(target: str, tied: bool) -> None:
    recipe = replace(load_recipe(target, checkpoint="someone/model"), name="mine")
    check_rules(_config(tied), recipe)
    assert idle_rules(_config(tied), recipe) == []


def test_a_rule_of_a_tied_head_alone_is_said_to_decide_nothing() -> None:
    recipe = _recipe(QuantRule("lm_head"), EVERYTHING)
    assert idle_rules(_config(True), recipe) == [
        "rule 1 ('lm_head') decides nothing: the head is tied to model.embed_tokens, whose rule holds"
    ]
    assert idle_rules(_config(False), recipe) == []


def test_the_plan_refuses_and_names(tmp_path: Path) -> None:
    checkpoint = synthetic_checkpoint(MODELS / "1.5b")
    wrong = replace(load_recipe("1.5b-cpu"), quantize=(QuantRule("lm_haed"), EVERYTHING))
    with pytest.raises(RecipeError, match="did you mean 'lm_head'"):
        plan_export(wrong, checkpoint, tmp_path / "x", "int4")
    tied = replace(checkpoint, config=_config(tied=True))
    plan = plan_export(
        replace(load_recipe("1.5b-cpu"), quantize=(QuantRule("lm_head"), EVERYTHING)),
        replace(tied, config=replace(tied.config, num_hidden_layers=28)),
        tmp_path / "x",
        "int4",
    )
    assert "tied to model.embed_tokens" in str(describe(plan).idle_rules)
