"""report.html of real reports: its sections, its figures, its escaping, and that it needs nothing but itself."""

from __future__ import annotations

import html.parser
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from toolkit.report import charts
from toolkit.report.formatting import (
    format_bytes,
    format_date,
    format_figure,
    format_kld,
    format_number,
    format_percent,
    format_seconds,
)
from toolkit.report.intact import page_with_digest
from toolkit.report.page import render_report
from toolkit.report.page_weights import own_tensors
from toolkit.report.sections import Check, NotMeasured, Report, Verdict
from toolkit.report.summary import load_report
from toolkit.report.weight_sections import TensorRow
from toolkit.typed_json import from_json, to_json

NASTY = "<script src='https://evil.example/x.js'>alert(\"1\")</script>"
# Each section of a report that the page has, by its id there.
SECTIONS = {
    "verdict": "checks",
    "not_measured": "not-measured",
    **{name: name for name in ("quantization", "parity", "tasks", "speed", "conversion", "partition")},
}


@pytest.fixture(scope="session")
def report(validated_bundle: Path) -> Report:
    """A real export's, validated with everything a CPU has."""
    return load_report(validated_bundle)


def hostile(report: Report) -> Report:
    """The report with every text in it trying to be markup."""
    raw = json.loads(json.dumps(to_json(report)), object_hook=_nasty)
    return from_json(Report, raw)


def _nasty(value: dict[str, Any]) -> dict[str, Any]:
    return {key: NASTY if isinstance(item, str) and key != "name" else item for key, item in value.items()}


class _Reader(html.parser.HTMLParser):
    """Collects what the tests ask about and checks that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def sections(self) -> set[str]:
        return {attrs["id"] or "" for tag, attrs in self.elements if tag == "section"}


def sections_of(report: Report) -> set[str]:
    return _Reader(render_report(report)).sections()


def section_text(page: str, name: str) -> str:
    """A section of the page without its tags."""
    body = page.partition(f'<section id="{name}">')[2].partition("</section>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_the_page_a_bundle_has_is_its_reports(report: Report, validated_bundle: Path) -> None:
    page = (validated_bundle / "report.html").read_text(encoding="utf-8")
    assert page == page_with_digest(render_report(report))


@pytest.mark.parametrize("kind", ["real", "hostile"])
def test_page_needs_nothing_but_itself(kind: str, report: Report) -> None:
    page = render_report(hostile(report) if kind == "hostile" else report)
    reader = _Reader(page)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in reader.elements}
    for _, attrs in reader.elements:
        assert not {"src", "href", "xlink:href", "srcset"} & attrs.keys()
        assert not any(key.startswith("on") for key in attrs)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_hostile_names_stay_text(report: Report) -> None:
    page = render_report(hostile(report))
    assert "<script" not in page and "&lt;script" in page
    for _, attrs in _Reader(page).elements:
        assert "alert" not in attrs


@pytest.mark.parametrize("name", SECTIONS)
def test_section_is_there_with_its_data_and_gone_without(name: str, report: Report) -> None:
    whole = sections_of(report)
    assert set(SECTIONS.values()) | {"machine"} <= whole
    gone: Any = () if name == "not_measured" else None
    assert sections_of(replace(report, **{name: gone})) == whole - {SECTIONS[name]}


def test_a_bare_report_is_a_page_too(report: Report) -> None:
    bare: dict[str, Any] = {field.name: None for field in fields(Report) if field.default is None}
    page = render_report(replace(report, **bare, not_measured=(NotMeasured("speed", "left out"),)))
    assert _Reader(page).sections() == {"machine", "not-measured"} and "Not judged" in page and "left out" in page


def test_key_figures_are_the_reports(report: Report) -> None:
    assert report.parity and report.quantization and report.speed and report.baseline
    page = render_report(report)
    cards = " ".join(re.sub(r"<[^>]*>", " ", page.partition('"Key figures">')[2].partition("</dl>")[0]).split())
    assert f"Bits per weight {report.quantization.bits_per_weight:.2f} plain 4-bit 5.00" in cards
    plain = format_kld(report.baseline.mean_kld)
    assert f"Mean KLD {format_kld(report.parity.mean_kld)} plain 4-bit {plain}" in cards
    assert f"Decoding {format_number(report.speed.decode_tokens_per_s)} tokens/s" in cards
    text = section_text(page, "parity")
    ratio = report.parity.mean_kld / report.baseline.mean_kld
    assert f"Mean KLD {format_kld(report.parity.mean_kld)} {plain} {ratio:.2f}" in text
    greedy = f"{report.parity.greedy_match_tokens} of {report.parity.greedy_tokens}"
    assert f"Greedy tokens in agreement {greedy}" in text


@pytest.mark.parametrize("layers", [4, 28, 80])
def test_heat_map_has_one_cell_for_each_layer_and_role(layers: int, report: Report) -> None:
    assert report.quantization is not None
    first = [tensor for tensor in report.quantization.tensors if tensor.layer == 0]
    stacked = tuple(replace(tensor, layer=layer) for layer in range(layers) for tensor in first)
    elements = _Reader(
        render_report(replace(report, quantization=replace(report.quantization, tensors=stacked)))
    ).elements
    cells = [(attrs["data-layer"], attrs["data-role"]) for _, attrs in elements if "data-layer" in attrs]
    assert sorted(cells) == sorted((str(layer), tensor.role) for layer in range(layers) for tensor in first)


def test_each_row_of_the_formats_draws_its_own_tensors(report: Report) -> None:
    """Two rows of one role, alike but for the size of their blocks, do not show each other's tensors."""
    quantization = report.quantization
    assert quantization is not None
    row = next(row for row in quantization.by_role if row.role == "q_proj")
    others = tuple(
        replace(tensor, block_size=2 * (tensor.block_size or 0), sqnr_db=(tensor.sqnr_db or 0) - 5)
        if tensor.role == "q_proj" and tensor.layer
        else tensor
        for tensor in quantization.tensors
    )
    rows = (replace(row, tensors=1), replace(row, block_size=2 * (row.block_size or 0), tensors=row.tensors - 1))
    assert [len(own_tensors(row, others)) for row in rows] == [row.tensors for row in rows]
    page = render_report(replace(report, quantization=replace(quantization, by_role=rows, tensors=others)))
    drawn = re.findall(r"q_proj: (\d+) tensors from", page)
    assert drawn == [str(row.tensors) for row in rows]
    # As it was made, each row counts what the list of tensors has.
    for made in quantization.by_role:
        assert len(own_tensors(made, quantization.tensors)) == made.tensors


def test_heat_scale_is_made_for_the_commonest_bit_width() -> None:
    cells = [charts.Cell(i, "q_proj", 4, 18 + i / 2) for i in range(6)] + [charts.Cell(0, "v_proj", 8, 43.0)]
    scale = charts.heat_scale(cells)
    assert scale is not None and scale.bits == 4 and scale.edges[-1] < 25
    assert [scale.shade(x) for x in (43.0, 20.9, 20.4, 18.0, 9.0)] == [1, 1, 2, 6, 6]


def test_heat_scale_ignores_exact_tensors() -> None:
    scale = charts.heat_scale([charts.Cell(0, "q_proj", 4, 20.0), charts.Cell(1, "q_proj", 4, None)])
    assert scale is not None and scale.edges[-1] < 21


def test_unquantized_tensors_have_no_scale() -> None:
    cells = [charts.Cell(0, "q_proj", 32, None)]
    assert charts.heat_scale(cells) is None
    assert "not quantized" in charts.heat_map(cells, ["q_proj"], None, "")


def test_synthetic_is_said_loudly(report: Report) -> None:
    assert "random weights" not in render_report(report)
    page = render_report(replace(report, synthetic=True))
    assert "random weights" in page and page.count('<em class="tag">') >= 4


def test_baseline_stands_beside_the_bundle(report: Report) -> None:
    assert "plain 4-bit" in render_report(report)
    assert "plain 4-bit" not in render_report(replace(report, baseline=None))


def test_answers_have_their_errors_lengths_and_cuts(report: Report) -> None:
    assert report.tasks and report.baseline and report.baseline.tasks
    task, plain = report.tasks[0], report.baseline.tasks[0]
    text = section_text(render_report(report), "tasks")
    theirs = task.reference()
    assert theirs is not None and task.accuracy_se is not None and task.accuracy_drop_se is not None
    for side, name in ((theirs, "reference"), (task, "this bundle"), (plain, "plain 4-bit")):
        accuracy = f"{format_percent(side.accuracy)} ± {format_percent(side.accuracy_se or 0)}"
        assert f"{task.name} {name} {accuracy}" in text
        assert f"{format_number(side.mean_answer_tokens)} {format_percent(side.truncated)}" in text
    assert f"of {task.max_new_tokens} tokens" in text
    alone = replace(task, reference_accuracy=None, accuracy_drop_se=None)
    assert "Drop, points" in text
    assert "Drop, points" not in section_text(render_report(replace(report, tasks=(alone,))), "tasks")


def test_checks_show_direction_error_and_bound(report: Report) -> None:
    checks = (
        Check("mean_kld", "<=", 0.02, True, 0.0123),
        Check("top1_agreement", ">=", 0.95, True, 0.9543),
        Check("accuracy_drop", "<=", 0.01, True, 0.1, 0.1, -0.081),
        Check("accuracy", ">=", 0.8, False, 0.5, 0.05, 0.58),
        Check("hidden_rms_error", "<=", 3.0, False),
    )
    page = render_report(replace(report, verdict=Verdict(False, checks)))
    limits = re.findall(r"[≤≥] [\d.]+(?:%| points)?", section_text(page, "checks"))
    assert limits == ["≤ 0.0200", "≥ 95.0%", "≤ 1.0 points", "≥ 80.0%", "≤ 3.00"]
    text = section_text(page, "checks")
    assert "10.0 ± 10.0 points" in text and "at least −8.1 points with 95% confidence" in text
    assert "50.0 ± 5.0%" in text and "at most 58.0% with 95% confidence" in text
    assert "not measured" in text and "Task accuracy drop" in text


def test_page_can_be_written_even_where_a_name_is_not_utf8(report: Report) -> None:
    page = render_report(replace(report, model="broken \ud800 name"))
    assert "broken ? name" in page.encode("utf-8").decode("utf-8")


def test_formats() -> None:
    assert format_bytes(812 * 2**20) == "812 MiB" and format_bytes(1.5 * 2**30) == "1.50 GiB"
    assert [format_percent(x) for x in (0.9543, 1.0, 0.9996, -0.012)] == ["95.4%", "100.0%", "99.96%", "−1.2%"]
    assert [format_kld(x) for x in (0.01234, 1.0649e-6, 0.0)] == ["0.0123", "1.06 × 10⁻⁶", "0"]
    assert [format_number(x) for x in (0.9999, 41.234, 1234.5, 16384)] == ["1.00", "41.2", "1,234", "16,384"]
    assert [format_seconds(x) for x in (0.412, 3.214, 252.4, 3780)] == ["412 ms", "3.21 s", "4 min 12 s", "1 h 3 min"]
    assert format_date("2026-11-24T21:59:39+00:00") == "24 November 2026, 21:59 UTC" and format_date("x") == "x"
    figures = [("accuracy_drop", 0.012), ("perplexity", 8.1), ("ttft_s", 0.412), ("peak_rss_bytes", 2**20)]
    assert [format_figure(*one) for one in figures] == ["1.2 points", "8.100", "412 ms", "1.00 MiB"]


def test_a_page_of_layers_that_are_not_known_has_no_map(report: Report) -> None:
    assert report.quantization is not None
    outside: tuple[TensorRow, ...] = tuple(t for t in report.quantization.tensors if t.layer is None)
    page = render_report(replace(report, quantization=replace(report.quantization, tensors=outside)))
    assert "data-layer" not in page and "Quantization by role" in page
