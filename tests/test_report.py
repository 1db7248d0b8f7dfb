"""report.json: its schema, its verdict, what is written and read back, and what older bundles have."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import jsonschema
import numpy as np
import pytest

from toolkit.bundle.manifest import read_manifest
from toolkit.errors import BundleError
from toolkit.figures import FIGURES, threshold_names
from toolkit.report.schema import SCHEMA_FILE, schema_text
from toolkit.report.sections import Report, TaskRow
from toolkit.report.summary import load_report, read_report, write_report
from toolkit.report.verdict import judge, value_of, wilson_interval
from toolkit.typed_json import field_kinds, present_kind, to_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def report(validated_bundle: Path) -> Report:
    return load_report(validated_bundle)


def answered(examples: int, lost: int, won: int, accuracy: float = 0.7) -> TaskRow:
    """A task of which `lost` questions became wrong and `won` right."""
    return TaskRow(
        accuracy=accuracy,
        mean_answer_tokens=50,
        truncated=0,
        accuracy_se=0.1,
        name="sums",
        examples=examples,
        max_new_tokens=300,
        reference_accuracy=accuracy + (lost - won) / examples,
        reference_accuracy_se=0.1,
        reference_mean_answer_tokens=50,
        reference_truncated=0,
        right_to_wrong=lost,
        wrong_to_right=won,
        accuracy_drop_se=0.1,
    )


def drop_passes(report: Report, threshold: float, *rows: TaskRow) -> bool:
    return judge(replace(report, tasks=rows), {"accuracy_drop": threshold}).passed


def test_the_schema_is_the_sections() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "python -m toolkit.report.schema"
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text()))


def test_a_real_report_keeps_to_the_schema_and_a_wrong_one_does_not(validated_bundle: Path) -> None:
    checker = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    raw = json.loads((validated_bundle / "report.json").read_text(encoding="utf-8"))
    checker.validate(raw)
    for wrong in (
        {**raw, "speed": None},
        {**raw, "parity": {**raw["parity"], "mean_kld": "small"}},
        {**raw, "parity": {key: value for key, value in raw["parity"].items() if key != "mean_kld"}},
        {**raw, "mean_kld": 0.1},
        {key: value for key, value in raw.items() if key != "machine"},
    ):
        assert not checker.is_valid(wrong)


def test_what_is_written_comes_back_as_it_was(report: Report, tmp_path: Path) -> None:
    written = write_report(tmp_path, report, report.not_measured)
    assert load_report(tmp_path) == written == report
    assert "null" not in (tmp_path / "report.json").read_text(encoding="utf-8")


def test_what_is_absent_is_named(report: Report, tmp_path: Path) -> None:
    bare: dict[str, Any] = {field.name: None for field in fields(Report) if field.default is None}
    written = write_report(tmp_path, replace(report, **bare))
    raw = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    named = {entry.name for entry in written.not_measured}
    # The verdict, the cache and the digest of all the rest are no measurements.
    bare.pop("digest")
    assert named == bare.keys() - {"verdict", "kv_cache", "form"} and not bare.keys() & raw.keys()
    assert all(written.reason(name) for name in named)


def test_measuring_anew_keeps_what_making_the_bundle_took(report: Report, validated_bundle: Path) -> None:
    again = read_report(validated_bundle, read_manifest(validated_bundle))
    assert again.conversion == report.conversion and again.quantization == report.quantization
    assert again.parity is None and again.verdict is None and again.tasks is None


def test_a_report_that_cannot_be_read_is_one_line(report: Report, validated_bundle: Path, tmp_path: Path) -> None:
    raw: Any = to_json(report)
    for broken, message in (
        ("{", "is not valid JSON"),
        (json.dumps({**raw, "conversion": {"wall_s": "long"}}), r"conversion.wall_s is 'long', expected a number"),
        (json.dumps({**raw, "tasks": {}}), r"tasks is {}, expected an array"),
    ):
        (tmp_path / "report.json").write_text(broken, encoding="utf-8")
        with pytest.raises(BundleError, match=message):
            load_report(tmp_path)
        assert read_report(tmp_path, read_manifest(validated_bundle)).conversion in (None, report.conversion)


def test_every_figure_is_a_field_of_its_section() -> None:
    sections = {name: kind for name, (_, kind) in field_kinds(Report).items()}
    for figure in FIGURES.values():
        first = figure.section.partition(".")[0]
        assert first in sections
        if not figure.sampled:
            (kind,) = [entry for entry in getattr(sections[first], "__args__", ()) if entry is not type(None)]
            assert (figure.key or figure.name) in field_kinds(kind), figure.name


def test_a_recipe_may_set_a_threshold_on_every_figure_that_says_so() -> None:
    """The schema of recipes has the same names."""
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    validate = schema["properties"]["validate"]
    assert validate["properties"].keys() == set(threshold_names()) and validate["additionalProperties"] is False


def test_values_are_the_sections_own(report: Report) -> None:
    assert report.parity and report.speed and report.tasks
    assert value_of(FIGURES["mean_kld"], report) == report.parity.mean_kld
    assert value_of(FIGURES["decode_tokens_per_s"], report) == report.speed.decode_tokens_per_s
    assert value_of(FIGURES["accuracy"], report) == report.tasks[0].accuracy
    drop = (report.tasks[0].reference_accuracy or 0) - report.tasks[0].accuracy
    assert value_of(FIGURES["accuracy_drop"], report) == pytest.approx(drop)
    for name in ("hidden_rms_error", "simulator_mean_kld", "simulator_accuracy", "simulator_accuracy_drop"):
        assert value_of(FIGURES[name], report) is None


def test_a_check_without_a_value_is_no_pass_and_no_check_is_none(report: Report) -> None:
    assert report.parity
    verdict = judge(report, {"mean_kld": report.parity.mean_kld, "hidden_rms_error": 9.0})
    assert [check.passed for check in verdict.checks] == [True, False] and not verdict.passed
    assert verdict.checks[1].value is None and not judge(report, {}).passed
    below = math.nextafter(report.parity.mean_kld, 0)
    assert not judge(report, {"mean_kld": below}).passed
    assert judge(report, {"top1_agreement": 0.5}).passed and not judge(report, {"top1_agreement": 1.1}).passed


def test_few_questions_cannot_fail_a_drop_and_many_can(report: Report) -> None:
    # One of ten, the only one, both of two: no evidence of a drop above a point and a half.
    for few in (answered(10, 1, 0), answered(1, 1, 0), answered(2, 2, 0), answered(20, 2, 1)):
        assert drop_passes(report, 0.015, few), few.examples
    # Five points of five hundred are evidence; so is a broken bundle on ten.
    for many in (answered(500, 30, 5), answered(2000, 70, 5), answered(10, 7, 0)):
        assert not drop_passes(report, 0.015, many), many.examples
    # And a drop within the threshold passes whatever the number.
    assert drop_passes(report, 0.015, answered(100_000, 1400, 0))
    assert not drop_passes(report, 0.015, answered(100_000, 1800, 0))
    # The task that speaks most against the bundle decides.
    assert not drop_passes(report, 0.015, answered(10, 1, 0), answered(500, 30, 5))


def test_a_drop_that_is_the_threshold_fails_one_time_in_twenty(report: Report) -> None:
    """By simulation: pairs that lose four of a hundred more than they win, held to exactly that."""
    rng, runs, failed = np.random.default_rng(0), 4000, 0
    for lost, won, _ in rng.multinomial(400, [0.08, 0.04, 0.88], size=runs):
        failed += not drop_passes(report, 0.04, answered(400, int(lost), int(won)))
    assert 0.03 < failed / runs < 0.07
    # Power: twelve points lost where four are allowed are seen nearly always.
    seen = sum(
        not drop_passes(report, 0.04, answered(400, int(lost), int(won)))
        for lost, won, _ in rng.multinomial(400, [0.14, 0.02, 0.84], size=500)
    )
    assert seen > 490


def test_accuracy_is_held_to_wilsons_bound(report: Report) -> None:
    def passes(examples: int, accuracy: float) -> bool:
        return judge(replace(report, tasks=(answered(examples, 0, 0, accuracy),)), {"accuracy": 0.8}).passed

    assert passes(10, 0.6) and not passes(500, 0.75) and passes(500, 0.78) and not passes(10, 0.2)
    (check,) = judge(replace(report, tasks=(answered(500, 0, 0, 0.75),)), {"accuracy": 0.8}).checks
    # 95% one-sided: Wilson's interval at 1.645.
    assert check.bound == pytest.approx(0.7805, abs=5e-4) and check.value == 0.75 and check.standard_error == 0.1


def test_wilson_interval_holds_the_textbook_values() -> None:
    low, high = wilson_interval(0.5, 100) or (0, 0)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)
    assert wilson_interval(0.5, 0) is None


def described_fields() -> dict[str, list[str]]:
    """By section, the fields that docs/report.md has a row for."""
    found: dict[str, list[str]] = {}
    section = None
    for line in (ROOT / "docs" / "report.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = "" if line == "## The report as a whole" else line.removeprefix("## ").strip("`")
        elif section is not None and line.startswith("| `"):
            found.setdefault(section, []).append(line.split("`")[1])
    return found


def fields_by_section(kind: type, path: str = "") -> dict[str, list[str]]:
    """By section, a dotted path with `[]` after what is a list, its fields."""
    found = {path: list(field_kinds(kind))}
    for name, (_, inner) in field_kinds(kind).items():
        inner, _ = present_kind(inner)
        listed = get_origin(inner) is tuple
        inner = get_args(inner)[0] if listed else inner
        if isinstance(inner, type) and is_dataclass(inner):
            found |= fields_by_section(inner, f"{path}.{name}".lstrip(".") + "[]" * listed)
    return found


def test_the_docs_explain_every_field() -> None:
    described, expected = described_fields(), fields_by_section(Report)
    assert described.keys() == expected.keys()
    for section, names in expected.items():
        assert set(described[section]) == set(names), section


def test_the_docs_example_of_a_gate_is_what_it_says(report: Report) -> None:
    bounds = []
    for row in (answered(10, 1, 0), answered(500, 30, 5)):
        (check,) = judge(replace(report, tasks=(row,)), {"accuracy_drop": 0.015}).checks
        bounds.append(f"{100 * (check.bound or 0):.1f}".replace("-", "−"))
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert [f"the bound is {bound} points" in text for bound in bounds] == [True, True], bounds
