"""What a forecast counts, beside shapes counted another way; and how much is measured where nobody says."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.opened import synthetic_checkpoint
from toolkit.checkpoint.weights import expected_tensors
from toolkit.cli.printing import one_document
from toolkit.pipeline.calibration_work import forward_work, solving_work, survey_work
from toolkit.pipeline.described import described_with_costs
from toolkit.pipeline.forecast import compile_seconds, forecast
from toolkit.pipeline.judge import Effort
from toolkit.pipeline.judge.answers import questions_left_out
from toolkit.pipeline.judge.work import FEWEST_QUESTIONS, FEWEST_TOKENS, sample
from toolkit.pipeline.plan import ExportPlan, plan_export
from toolkit.pipeline.work import TYPICAL, MachineSpeed, Work, measure_speed
from toolkit.quant.formats import planned_specs
from toolkit.recipe import load_recipe
from toolkit.target import CPU_FORM, TARGETS, Form

MODELS: Final = Path(__file__).parent.parent / "models"


def _form(recipe_name: str) -> tuple[ModelConfig, Form]:
    recipe = load_recipe(recipe_name)
    facts = recipe.facts()
    assert facts is not None
    return read_config(facts), TARGETS[recipe.target].in_profile(recipe.profile).form


def _plan(recipe_name: str, tmp_path: Path) -> ExportPlan:
    recipe = load_recipe(recipe_name)
    facts = recipe.facts()
    assert facts is not None
    return plan_export(recipe, synthetic_checkpoint(facts), tmp_path / "bundle", "int4")


def _changed(model: str, changes: dict[str, int], quality: str, tmp_path: Path, *said: str) -> ExportPlan:
    raw = json.loads((MODELS / model / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}), encoding="utf-8")
    recipe = load_recipe("cpu", [f"quality={quality}", *said], str(tmp_path))
    return plan_export(recipe, synthetic_checkpoint(tmp_path), tmp_path / "bundle", "int4")


# Qwen2.5-Coder-0.5B beside the 1.5B, and what the machine that converted both said of itself.
SMALLER = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
# One layer of V3 at its true widths.
OF_V3 = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 16, "vocab_size": 4096}
THEN = MachineSpeed(products_per_s=1.71e11, elements_per_s=2.06e9, steps_per_s=7.9e5, bytes_per_s=2.4e10)


def test_seconds_are_each_kind_of_work_over_its_rate() -> None:
    work = Work(products=6.0, elements=20.0) + Work(steps=3.0, nbytes=8.0) * 2
    assert work.seconds(MachineSpeed(2.0, 4.0, 3.0, 16.0)) == 6 / 2 + 20 / 4 + 6 / 3 + 16 / 16


@pytest.mark.parametrize("model", ["1.5b", "8b", "tiny-r1"])
def test_products_of_a_forward_pass_are_two_for_each_weight_of_a_layer_and_token(model: str) -> None:
    config = read_config(MODELS / model)
    shapes = expected_tensors(config)
    weights = sum(a * b for name, (a, b) in ((n, s) for n, s in shapes.items() if len(s) == 2) if ".layers." in name)
    scores = config.num_hidden_layers * config.num_attention_heads * config.head_dim * 2
    assert forward_work(config, 1000, 500, 2).products == 1000 * 2 * (weights + 500 * scores)


def test_calibrating_grows_with_folds_probes_and_solving() -> None:
    config, form = _form("1.5b-cpu")
    recipe = load_recipe("1.5b-cpu", ["quality=best"])
    specs = planned_specs(config, recipe, form)
    searched = {name: replace(spec, algorithm="imatrix") for name, spec in specs.items()}
    plain, folded, folded_wider, probed = (
        survey_work(config, some, 4096, folds, probes).seconds(TYPICAL)
        for some, folds, probes in (
            (specs, False, False),
            (specs, True, False),
            (searched, True, False),
            (searched, True, True),
        )
    )
    assert plain < folded < folded_wider < probed
    one, two = (solving_work(config, [], 4096, streams).seconds(TYPICAL) for streams in (1, 2))
    assert forward_work(config, 4096, 512, 8).seconds(TYPICAL) < one < two


@pytest.mark.parametrize(
    ("changes", "quality", "took"),
    [(SMALLER, "balanced", 96), ({}, "balanced", 252), (SMALLER, "best", 262), ({}, "best", 966)],
    ids=["0.5B", "1.5B", "0.5B best", "1.5B best"],
)
def test_an_export_takes_what_whole_exports_took(
    changes: dict[str, int], quality: str, took: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coder-0.5B and Coder-1.5B on two quiet cores, packing included (LOG.md, 2026-11-28 and 29)."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    seconds = sum(phase.forecast_s for phase in forecast(_changed("1.5b", changes, quality, tmp_path), THEN, None))
    assert seconds == pytest.approx(took, rel=0.15)


@pytest.mark.parametrize(
    ("layers", "quality", "read"),
    [(1, "best", 16384), (24, "best", 8192), (1, "balanced", 2560)],
    ids=["small, best", "larger, best", "small, balanced"],
)
def test_a_small_model_reads_more_text_at_best(layers: int, quality: str, read: int, tmp_path: Path) -> None:
    """A layer of the 0.5B has 15 M parameters, the embedding, which is its head too, 136 M."""
    plan = _changed("1.5b", SMALLER | {"num_hidden_layers": layers, "tie_word_embeddings": True}, quality, tmp_path)
    assert plan.calibration_cost and plan.calibration_cost.tokens == read


def test_a_text_whose_length_is_asked_for_is_taken_whole_in_wide_inputs_too(tmp_path: Path) -> None:
    """down_proj of the 1.5B: 8,960 channels, 1,536 rows, 1,536 or 2,560 tokens (quant/gptq_tokens.py)."""
    left, whole = (
        plan.calibration_cost.work.products
        for said in ((), ("calibration_tokens=2560",))
        if (plan := _changed("1.5b", {}, "balanced", tmp_path, *said)).calibration_cost
    )
    some, every = (4 * tokens**2 * 8960 + 6 * tokens * 1536 * 8960 for tokens in (1536, 2560))
    assert whole - left == pytest.approx(28 * (every - some))


@pytest.mark.parametrize(
    ("model", "changes", "quality", "held"),
    [
        ("1.5b", SMALLER, "balanced", 0.874e9),
        ("1.5b", SMALLER, "best", 0.916e9),
        ("1.5b", {}, "balanced", 1.47e9),
        ("deepseek-v3", OF_V3, "balanced", 3.17e9),
    ],
    ids=["0.5B", "0.5B best", "1.5B", "a layer of V3"],
)
def test_memory_is_little_more_than_was_held(
    model: str, changes: dict[str, int], quality: str, held: float, tmp_path: Path
) -> None:
    """Whole exports, and a layer of V3, two cores (LOG.md, 2026-11-28 and 29)."""
    assert held < _changed(model, changes, quality, tmp_path).peak_memory_bytes < 1.2 * held


@pytest.mark.parametrize(("recipe", "took"), [("1.5b-qnn", 232), ("14b-qnn", 1718)])
def test_compiling_takes_what_it_took_at_4096_tokens(recipe: str, took: float, tmp_path: Path) -> None:
    """In 2 parts on a quiet machine, and in 12 on a busy one (LOG.md)."""
    assert compile_seconds(_plan(recipe, tmp_path), TYPICAL, 4096) == pytest.approx(took, rel=0.15)


@pytest.mark.parametrize(
    ("model", "layers", "took"), [("1.5b", 1, 4.1), ("1.5b", 2, 5.9), ("14b", 1, 9.9)], ids=["1.5B", "two", "14B"]
)
def test_a_longer_context_takes_the_compiler_longer(model: str, layers: int, took: float, tmp_path: Path) -> None:
    """CPU seconds of layers of those widths in one part, 16,384 tokens less 4,096 (LOG.md, 2026-11-28)."""
    raw = json.loads((MODELS / model / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": layers}), encoding="utf-8")
    recipe = load_recipe("qnn", ["quality=fast"], str(tmp_path))
    plan = plan_export(recipe, synthetic_checkpoint(tmp_path), tmp_path / "bundle", "int4")
    longer = compile_seconds(plan, TYPICAL, 16384) - compile_seconds(plan, TYPICAL, 4096)
    assert longer == pytest.approx(took, rel=0.15)


def test_a_plan_has_the_compilers_time_for_each_context(tmp_path: Path) -> None:
    plan = _plan("1.5b-qnn", tmp_path)
    (shown,) = described_with_costs([plan], None)
    contexts = shown.npu_contexts or ()
    (phase,) = [row for row in shown.forecast or () if row.phase == "compile"]
    assert [row.context_length for row in contexts] == [4096, 8192, 16384]
    (asked,) = [row for row in contexts if row.is_asked]
    assert asked.compile_s == phase.forecast_s
    assert [row.compile_s for row in contexts] == sorted({row.compile_s or 0.0 for row in contexts})
    (left,) = described_with_costs([plan], None, compiles=False)
    assert [row.compile_s for row in left.npu_contexts or ()] == [None] * 3


def test_a_sample_is_what_fits_and_the_same_everywhere() -> None:
    config, form = _form("tiny-r1-cpu")
    on_cpu = sample(Effort(), config, form, True)
    assert on_cpu.tokens == 2000 and FEWEST_QUESTIONS < on_cpu.examples < 500
    # QDQ graphs restore each weight for each token on the CPU.
    assert sample(Effort(), config, _form("tiny-r1-qnn")[1], True).examples == FEWEST_QUESTIONS
    large = sample(Effort(), read_config(MODELS / "14b"), CPU_FORM, False)
    assert (large.tokens, large.examples) == (FEWEST_TOKENS, FEWEST_QUESTIONS)
    named = sample(Effort(tokens=77, examples=444), read_config(MODELS / "14b"), CPU_FORM, False)
    assert (named.tokens, named.examples) == (77, 444)


def test_phases_come_in_order_and_only_where_they_happen(tmp_path: Path) -> None:
    plan = _plan("1.5b-qnn", tmp_path)
    assert [p.phase for p in forecast(plan, TYPICAL, Effort())] == ["calibrate", "pack", "compile", "validate"]
    assert [p.phase for p in forecast(plan, TYPICAL, None, compiles=False)] == ["calibrate", "pack"]
    away = replace(plan, opened=replace(plan.opened, download_bytes=10**9))
    download = forecast(away, TYPICAL, None)[0]
    assert (download.phase, download.forecast_s, download.disk_bytes) == ("download", 40.0, 10**9)
    assert "assumed" in download.basis


def test_a_slower_machine_takes_longer_by_as_much(tmp_path: Path) -> None:
    plan = _plan("1.5b-cpu", tmp_path)
    half = MachineSpeed(
        *(
            rate / 2
            for rate in (TYPICAL.products_per_s, TYPICAL.elements_per_s, TYPICAL.steps_per_s, TYPICAL.bytes_per_s)
        )
    )
    for fast, slow in zip(forecast(plan, TYPICAL, Effort()), forecast(plan, half, Effort()), strict=True):
        assert slow.forecast_s == pytest.approx(2 * fast.forecast_s)


def test_a_plan_says_each_phase_and_what_is_sampled(tmp_path: Path) -> None:
    (shown,) = described_with_costs([_plan("tiny-r1-cpu", tmp_path)], Effort())
    rows = json.loads(one_document([shown]))["forecast"]
    assert [row["phase"] for row in rows] == ["calibrate", "pack", "validate"]
    assert all(row["forecast_s"] > 0 for row in rows)
    assert "2000 tokens, 200 of 500 questions" in rows[-1]["basis"]


def test_the_machine_is_measured_in_a_second() -> None:
    speed = measure_speed()
    assert min(speed.products_per_s, speed.elements_per_s, speed.steps_per_s, speed.bytes_per_s) > 1e3


def test_questions_that_were_not_asked_are_named(tmp_path: Path) -> None:
    task = tmp_path / "sums.jsonl"
    task.write_text("\n".join(json.dumps({"prompt": f"{k}+1=", "answer": str(k + 1)}) for k in range(7)), "utf-8")

    (left,) = questions_left_out([task], Effort(examples=3))
    assert left.name == "tasks.examples" and left.reason == "sums: the first 3 of 7 questions (all: --examples 7)"
    assert questions_left_out([task], Effort(examples=7)) == []
    assert questions_left_out([task], Effort(examples=3, tasks=False)) == []
