"""Two reports side by side: what is a regression, and what the sample, the machine or a user's tolerance allows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_line import called
from toolkit.errors import RecipeError
from toolkit.files import write_json
from toolkit.report.compare import compare_reports
from toolkit.report.sections import Report, TaskRow
from toolkit.report.summary import load_report
from toolkit.typed_json import to_json


@pytest.fixture(scope="module")
def report(validated_bundle: Path) -> Report:
    return load_report(validated_bundle)


def with_kld(report: Report, mean_kld: float) -> Report:
    assert report.parity
    return replace(report, parity=replace(report.parity, mean_kld=mean_kld))


def answered(report: Report, right: int, examples: int) -> Report:
    row = TaskRow(
        name="sums",
        accuracy=right / examples,
        examples=examples,
        mean_answer_tokens=50,
        truncated=0,
        max_new_tokens=300,
    )
    return replace(report, tasks=(row,))


def test_a_report_is_no_worse_than_itself_and_has_a_row_a_figure(report: Report) -> None:
    found = compare_reports(report, report)
    assert found.passed and found.regressions == [] and found.notes == ()
    rows = {row.name: row for row in found.figures}
    assert report.quantization and report.parity and report.speed and report.conversion
    for name, value in (
        ("weight_bytes", report.quantization.weight_bytes),
        ("bits_per_weight", report.quantization.bits_per_weight),
        ("mean_kld", report.parity.mean_kld),
        ("top1_agreement", report.parity.top1_agreement),
        ("perplexity", report.parity.perplexity),
        ("decode_tokens_per_s", report.speed.decode_tokens_per_s),
        ("peak_rss_bytes", report.speed.peak_rss_bytes),
        ("conversion_s", report.conversion.wall_s),
        ("conversion_rss_bytes", report.conversion.peak_rss_bytes),
    ):
        assert (rows[name].a, rows[name].b) == (value, value), name
    assert report.tasks and rows["arithmetic.accuracy"].a == report.tasks[0].accuracy


@pytest.mark.parametrize(
    ("before", "after", "tolerance", "passed"),
    [
        (0.0100, 0.0105, None, True),
        (0.0100, 0.01051, None, False),
        (0.0100, 0.0050, None, True),
        (0.0100, 0.0119, "20%", True),
        (0.0100, 0.0121, "20%", False),
        (0.0100, 0.0102, "0.0001", False),
        (0.0100, 9.0, "any", True),
        # The last bits of float32: five times as much of next to nothing.
        (1e-6, 5e-6, None, True),
    ],
)
def test_a_figure_may_be_worse_by_its_tolerance(
    report: Report, before: float, after: float, tolerance: str | None, passed: bool
) -> None:
    asked = {"mean_kld": tolerance} if tolerance else {}
    found = compare_reports(with_kld(report, before), with_kld(report, after), asked)
    assert found.passed is passed
    assert [line.startswith("mean_kld went from 0.0100 to ") for line in found.regressions] == [True] * (not passed)


def test_of_some_figures_more_is_better(report: Report) -> None:
    assert report.parity
    worse = replace(report, parity=replace(report.parity, top1_agreement=report.parity.top1_agreement - 0.006))
    assert [line.split()[0] for line in compare_reports(report, worse).regressions] == ["top1_agreement"]
    assert compare_reports(worse, report).passed


@pytest.mark.parametrize(
    ("right", "examples", "passed"),
    [
        # Of 438 and 417 right of 500 Agresti and Caffo's difference is .0418, 1.645 standard errors are .0366; of 421
        # they are .0339 and .0362.
        (417, 500, False),
        (421, 500, True),
        (500, 500, True),
    ],
)
def test_an_accuracy_is_worse_where_the_sample_shows_it(
    report: Report, right: int, examples: int, passed: bool
) -> None:
    found = compare_reports(answered(report, 438, 500), answered(report, right, examples))
    assert found.passed is passed
    assert passed or found.regressions[0].startswith("sums.accuracy went from 87.6% to 83.4% on 500 and 500 questions")


def test_one_question_of_ten_shows_nothing(report: Report) -> None:
    assert compare_reports(answered(report, 10, 10), answered(report, 9, 10)).passed


def test_what_is_no_longer_measured_is_lost(report: Report) -> None:
    lost = compare_reports(report, replace(report, tasks=None))
    assert lost.regressions == ["arithmetic.accuracy was measured in the first and is not in the second"]
    assert compare_reports(replace(report, tasks=None), report).passed
    assert compare_reports(report, replace(report, tasks=None), {"accuracy": "any"}).passed


def test_speed_is_judged_between_equal_machines_unless_it_is_asked_for(report: Report) -> None:
    assert report.speed
    speed = report.speed.decode_tokens_per_s / 2
    slower = replace(report, speed=replace(report.speed, decode_tokens_per_s=speed))
    assert [line.split()[0] for line in compare_reports(report, slower).regressions] == ["decode_tokens_per_s"]
    elsewhere = replace(slower, machine=replace(report.machine, cpu="Another"))
    found = compare_reports(report, elsewhere)
    assert found.passed and "the machines differ" in found.notes[0]
    assert not compare_reports(report, elsewhere, {"decode_tokens_per_s": "40%"}).passed


def test_no_such_figure_or_amount_is_refused(report: Report) -> None:
    with pytest.raises(RecipeError, match="no figure 'mean_kl'"):
        compare_reports(report, report, {"mean_kl": "5%"})
    with pytest.raises(RecipeError, match="'-5%', expected an amount"):
        compare_reports(report, report, {"mean_kld": "-5%"})


def test_the_command_prints_rows_and_leaves_with_1_on_a_regression(
    report: Report, validated_bundle: Path, tmp_path: Path
) -> None:
    assert report.parity
    worse = tmp_path / "later.json"
    write_json(worse, to_json(with_kld(report, report.parity.mean_kld * 1.2)))
    done = called("compare", str(validated_bundle), str(worse))
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if line.startswith("REGRESSION: mean_kld went")]
    assert called("compare", str(validated_bundle), str(worse), "--tolerance", "mean_kld=25%").returncode == 0
    document = json.loads(called("compare", str(validated_bundle), str(worse), "--json").stdout)
    (row,) = [row for row in document["figures"] if "regression" in row]
    assert not document["passed"] and row["name"] == "mean_kld" and row["tolerance"] == "5%"


def test_what_is_no_report_is_one_line(validated_bundle: Path, tmp_path: Path) -> None:
    for words, said in (
        ((str(validated_bundle), str(tmp_path)), "report.json is missing"),
        ((str(validated_bundle), str(tmp_path / "none.json")), "expected a bundle's folder or its report.json"),
        ((str(validated_bundle), str(validated_bundle), "--tolerance", "mean_kld"), "expected FIGURE=AMOUNT"),
    ):
        done = called("compare", *words)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
