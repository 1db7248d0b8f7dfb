"""report.html: its sections, its escaping, and that it needs nothing but itself."""

from __future__ import annotations

import html.parser
import json
import random
import re
from typing import Any

import pytest

from toolkit.report import charts
from toolkit.report.figures import format_bytes, format_date, format_kld, format_number, format_percent, format_seconds
from toolkit.report.page import render_report, wilson_interval
from toolkit.report.summary import judge

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OWN_SECTIONS = (
    "quantization",
    "parity",
    "tasks",
    "speed",
    "ceiling",
    "simulator",
    "conversion",
    "partition",
    "machine",
)
NASTY = "<script src='https://evil.example/x.js'>alert(\"1\")</script>"


def sample_report(layers: int = 28) -> dict[str, Any]:
    """Every section and every figure, of a model with `layers` layers."""
    rng = random.Random(layers)
    tensors = [_tensor(role, layer, layers, rng) for layer in range(layers) for role in ROLES]
    head = {"role": "lm_head", "algorithm": "rtn", "bits": 8, "block_size": 32, "symmetric": False, "sqnr_db": 43.8}
    tensors.append({"name": "lm_head.weight", **head})
    return {
        "schema_version": 1,
        "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "target": "qnn",
        "recipe": "1.5b-qnn",
        "synthetic": False,
        "created": "2026-11-24T21:59:39+00:00",
        "machine": {
            "cpu": "AMD EPYC 7763 64-Core Processor",
            "cores": 2,
            "ram_bytes": 25_200_000_000,
            "os": "Linux 6.1.0 x86_64",
            "python": "3.11.9",
            "versions": {"onnxruntime": "1.23.2", "onnxruntime_genai": "0.12.2", "numpy": "2.3.4", "onnx_ir": "1.1.0"},
        },
        "conversion": {
            "wall_s": 252.4,
            "peak_rss_bytes": 2_310_000_000,
            "bytes_read": 3_554_214_000,
            "bytes_written": 1_113_000_000,
            "stages": [
                {"name": "read and check", "wall_s": 3.1},
                {"name": "calibrate", "wall_s": 71.4},
                {"name": "quantize", "wall_s": 139.6},
                {"name": "write graphs", "wall_s": 8.3},
                {"name": "hash", "wall_s": 6.2},
                {"name": "validate", "wall_s": 23.8},
            ],
        },
        "quantization": {
            "bits_per_weight": 4.87,
            "weight_bytes": 1_081_344_000,
            "tensors": tensors,
            "by_role": [
                *(
                    {
                        "role": role,
                        "algorithm": "gptq",
                        "bits": 4,
                        "block_size": 32,
                        "symmetric": True,
                        "tensors": layers,
                        "bytes": 3_000_000 * (1 + index) * layers,
                        "sqnr_db": 19.5 + index / 5,
                    }
                    for index, role in enumerate(ROLES)
                ),
                {**head, "tensors": 1, "bytes": 262_000_000},
                {"role": "input_layernorm", "algorithm": "none", "bits": 32, "tensors": layers, "bytes": 172_032},
            ],
        },
        "partition": [
            {
                "stage": "embeddings",
                "file": "embeddings.onnx",
                "ep": "cpu",
                "device": "cpu",
                "nodes": 1,
                "nodes_on_ep": 1,
            },
            {
                "stage": "context",
                "file": "context_ctx.onnx",
                "ep": "qnn",
                "device": "npu",
                "nodes": 812,
                "nodes_on_ep": 798,
                "compiled": True,
                "bin_bytes": 702_000_000,
            },
            {
                "stage": "iterator",
                "file": "iterator_ctx.onnx",
                "ep": "qnn",
                "device": "npu",
                "nodes": 812,
                "nodes_on_ep": 812,
                "compiled": False,
            },
            {"stage": "lm_head", "file": "lm_head.onnx", "ep": "cpu", "device": "cpu", "nodes": 3, "nodes_on_ep": 3},
        ],
        **_measured(rng),
        "not_measured": [{"name": "energy", "reason": "this machine has no power meter"}],
    }


def _measured(rng: random.Random) -> dict[str, Any]:
    """What validation adds: quality, speed and the verdict."""
    kld = _kld(-2.9, rng)
    return {
        "parity": {
            "reference": "numpy float32 forward of the checkpoint",
            "tokens": 16384,
            "max_abs_logit_error": 3.214,
            "top1_agreement": 0.9543,
            "perplexity": 8.3127,
            "reference_perplexity": 8.1209,
            "greedy_match_tokens": 61,
            **kld,
        },
        "baseline": {
            "name": "rtn, 4 bits, block 32, symmetric",
            "bits_per_weight": 4.51,
            "top1_agreement": 0.9312,
            "perplexity": 8.702,
            **_kld(-2.4, rng),
            "tasks": [
                {
                    "name": "gsm8k",
                    "examples": 400,
                    "accuracy": 0.7075,
                    "accuracy_se": 0.02277,
                    "mean_answer_tokens": 1311.2,
                    "truncated": 0.1075,
                },
                {"name": "arc_easy", "examples": 1000, "accuracy": 0.654},
            ],
        },
        "tasks": [
            {
                "name": "gsm8k",
                "examples": 400,
                "max_new_tokens": 4000,
                "accuracy": 0.735,
                "accuracy_se": 0.02209,
                "mean_answer_tokens": 1044.6,
                "truncated": 0.0425,
                "reference_accuracy": 0.7425,
                "reference_accuracy_se": 0.02189,
                "reference_mean_answer_tokens": 988.3,
                "reference_truncated": 0.0375,
                "right_to_wrong": 14,
                "wrong_to_right": 11,
                "accuracy_drop_se": 0.01251,
            },
            {"name": "arc_easy", "examples": 1000, "accuracy": 0.671, "reference_accuracy": 0.668},
        ],
        "speed": {
            "runtime": "onnxruntime-genai",
            "threads": 2,
            "load_s": 1.42,
            "ttft_s": 0.812,
            "prompt_tokens": 128,
            "prefill_tokens_per_s": 161.2,
            "decode_tokens_per_s": 14.31,
            "peak_rss_bytes": 1_640_000_000,
            "runs": [
                {"ttft_s": 0.812 + d / 90, "prefill_tokens_per_s": 161.2 - 4 * d, "decode_tokens_per_s": 14.31 - d / 3}
                for d in (0, -0.7, 0.4, 1.0, -0.2)
            ],
        },
        "simulator": {
            "ep": "qnn",
            "stage": "iterator",
            "hidden_rms_error": 0.0021,
            "top1_agreement": 0.948,
            "tokens": 512,
        },
        "ceiling": [
            {"device": "Snapdragon X Elite", "memory_bytes_per_s": 135_000_000_000, "decode_tokens_per_s": 124.8},
            {"device": "Core Ultra 7 258V", "memory_bytes_per_s": 136_500_000_000, "decode_tokens_per_s": 126.2},
        ],
        "verdict": {
            "passed": False,
            "checks": [
                {"name": "mean_kld", "value": kld["mean_kld"], "relation": "<=", "threshold": 0.02, "passed": True},
                {"name": "top1_agreement", "value": 0.9543, "relation": ">=", "threshold": 0.95, "passed": True},
                {"name": "accuracy_drop", "value": 0.00225, "relation": "<=", "threshold": 0.01, "passed": True},
                {"name": "max_abs_logit_error", "value": 3.214, "relation": "<=", "threshold": 3.0, "passed": False},
            ],
        },
    }


def minimal_report() -> dict[str, Any]:
    """Identity, verdict, and why there is nothing else."""
    kept = ("schema_version", "model", "target", "recipe", "synthetic", "created")
    check = {"name": "mean_kld", "value": 0.00067, "relation": "<=", "threshold": 0.01, "passed": True}
    return {
        **{key: value for key, value in sample_report(4).items() if key in kept},
        "verdict": {"passed": True, "checks": [check]},
        "not_measured": [{"name": name, "reason": "--no-validate"} for name in OWN_SECTIONS],
    }


def hostile_report() -> dict[str, Any]:
    """Names that try to be markup, empty lists, counts that are all zero."""
    report: dict[str, Any] = json.loads(json.dumps(sample_report(4)), object_hook=_nasty)
    report["parity"]["kld_histogram"]["counts"] = [0] * len(report["parity"]["kld_histogram"]["counts"])
    report["baseline"]["kld_histogram"]["counts"] = [0] * len(report["baseline"]["kld_histogram"]["counts"])
    report["conversion"] |= {"stages": [], "wall_s": 0.0}
    report["partition"] = [{"stage": NASTY, "file": NASTY, "ep": NASTY, "device": NASTY, "nodes": 0, "nodes_on_ep": 0}]
    report["tasks"][0] |= {"examples": 0, "accuracy": 0.0, "reference_accuracy": 1.0}
    report |= {"baseline": {**report["baseline"], "tasks": []}, "not_measured": [], "ceiling": []}
    report["speed"]["runs"] = []
    return report


def _nasty(value: dict[str, Any]) -> dict[str, Any]:
    return {key: NASTY if isinstance(item, str) else item for key, item in value.items()}


def _tensor(role: str, layer: int, layers: int, rng: random.Random) -> dict[str, Any]:
    bits = 8 if role == "v_proj" and layer < 2 else 4
    edge = 2.5 * (2 * layer / max(layers - 1, 1) - 1) ** 4
    sqnr_db = 20 + 0.35 * ROLES.index(role) - edge - 2.5 * (role == "down_proj") + rng.gauss(0, 0.35) + 24 * (bits == 8)
    kind = {"algorithm": "gptq", "bits": bits, "block_size": 32, "symmetric": True, "sqnr_db": sqnr_db}
    return {"name": f"model.layers.{layer}.{role}.weight", "role": role, "layer": layer, **kind}


def _kld(centre: float, rng: random.Random) -> dict[str, Any]:
    """KLD figures and histogram of 16,384 log-normal positions around 10^centre."""
    logs = sorted(rng.gauss(centre, 0.7 if rng.random() < 0.8 else 1.1) for _ in range(16384))
    edges = [-8 + 0.2 * index for index in range(51)]
    counts = [0] * 50
    for log in logs:
        counts[min(max(int((log + 8) / 0.2), 0), 49)] += 1
    marks = {f"{name}_kld": 10 ** logs[int(q * 16384)] for name, q in (("median", 0.5), ("p99", 0.99), ("p999", 0.999))}
    mean = sum(10**log for log in logs) / 16384
    return {"mean_kld": mean, **marks, "kld_histogram": {"log10_edges": edges, "counts": counts}}


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


REPORTS = {"full": sample_report(), "minimal": minimal_report(), "hostile": hostile_report()}


@pytest.mark.parametrize("name", REPORTS)
def test_page_needs_nothing_but_itself(name: str) -> None:
    page = render_report(REPORTS[name])
    reader = _Reader(page)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in reader.elements}
    for _, attrs in reader.elements:
        assert not {"src", "href", "xlink:href", "srcset"} & attrs.keys()
        assert not any(key.startswith("on") for key in attrs)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_hostile_names_stay_text() -> None:
    page = render_report(REPORTS["hostile"])
    assert "<script" not in page and "&lt;script" in page
    for _, attrs in _Reader(page).elements:
        assert "alert" not in attrs


@pytest.mark.parametrize("name", [*OWN_SECTIONS, "verdict", "not_measured"])
def test_section_is_there_with_its_data_and_gone_without(name: str) -> None:
    report = sample_report(4)
    section = {"verdict": "checks", "not_measured": "not-measured"}.get(name, name)
    others = _Reader(render_report(report)).sections() - {section}
    assert section in _Reader(render_report(report)).sections()
    del report[name]
    report.pop("baseline")
    assert _Reader(render_report(report)).sections() == others


def test_section_survives_the_loss_of_any_one_figure() -> None:
    for name, section in sample_report(4).items():
        for key in section if isinstance(section, dict) else ():
            report = sample_report(4)
            del report[name][key]
            assert render_report(report)


def test_minimal_page_has_verdict_and_reasons() -> None:
    page = render_report(REPORTS["minimal"])
    assert _Reader(page).sections() == {"checks", "not-measured"}
    assert "Passed" in page and page.count("--no-validate") == len(OWN_SECTIONS)


def test_page_renders_without_a_verdict() -> None:
    assert "Not judged" in render_report({"model": "m"})


@pytest.mark.parametrize("layers", [4, 28, 80])
def test_heat_map_has_one_cell_for_each_layer_and_role(layers: int) -> None:
    elements = _Reader(render_report(sample_report(layers))).elements
    cells = [(attrs["data-layer"], attrs["data-role"]) for tag, attrs in elements if "data-layer" in attrs]
    assert sorted(cells) == sorted((str(layer), role) for layer in range(layers) for role in ROLES)


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


def test_synthetic_is_said_loudly() -> None:
    report = sample_report(4)
    assert "random weights" not in render_report(report)
    page = render_report({**report, "synthetic": True})
    assert "random weights" in page and page.count('<em class="tag">') >= 4


def test_baseline_stands_beside_the_bundle() -> None:
    report = sample_report(4)
    assert "plain 4-bit" in render_report(report)
    del report["baseline"]
    assert "plain 4-bit" not in render_report(report)


def test_answers_have_their_errors_lengths_and_cuts() -> None:
    page = render_report(sample_report(4))
    section = page[page.index('<section id="tasks">') : page.index('<section id="speed">')]
    cell = re.compile(r"<t[hd][^>]*>(?:<span.*?</i>)?(.*?)(?:</span>)?</t[hd]>")
    rows = [cell.findall(row) for row in section.split("<tr>")[2:]]
    assert rows[:3] == [
        ["gsm8k", "reference", "74.2% ± 2.2%", "", "988", "3.8%"],
        ["gsm8k", "this bundle", "73.5% ± 2.2%", "0.8 ± 1.3", "1,045", "4.2%"],
        ["gsm8k", "plain 4-bit", "70.8% ± 2.3%", "", "1,311", "10.8%"],
    ]
    assert rows[4] == ["arc_easy", "this bundle", "67.1%", "", "–", "–"] and "of 4000 tokens" in section
    report = sample_report(4)
    for task in (*report["tasks"], *report["baseline"]["tasks"]):
        for key in [key for key in task if key.endswith(("_se", "tokens", "truncated"))]:
            del task[key]
    section = render_report(report)
    assert "Tokens of an answer" not in section and "standard error" not in section


def test_direction_of_a_check_is_shown() -> None:
    page = render_report(sample_report(4))
    limits = re.findall(r"[≤≥] [\d.]+(?:%| points)?", page)
    assert limits[:4] == ["≤ 0.0200", "≥ 95.0%", "≤ 1.0 points", "≤ 3.00"]


def test_page_can_be_written_even_where_a_name_is_not_utf8() -> None:
    page = render_report({"model": "broken \ud800 name"})
    assert "broken ? name" in page.encode("utf-8").decode("utf-8")


def test_formats() -> None:
    assert format_bytes(812 * 2**20) == "812 MiB" and format_bytes(1.5 * 2**30) == "1.50 GiB"
    assert [format_percent(x) for x in (0.9543, 1.0, 0.9996, -0.012)] == ["95.4%", "100.0%", "99.96%", "−1.2%"]
    assert [format_kld(x) for x in (0.01234, 1.0649e-6, 0.0)] == ["0.0123", "1.06 × 10⁻⁶", "0"]
    assert [format_number(x) for x in (0.9999, 41.234, 1234.5, 16384)] == ["1.00", "41.2", "1,234", "16,384"]
    assert [format_seconds(x) for x in (0.412, 3.214, 252.4, 3780)] == ["412 ms", "3.21 s", "4 min 12 s", "1 h 3 min"]
    assert format_date("2026-11-24T21:59:39+00:00") == "24 November 2026, 21:59 UTC" and format_date("x") == "x"


def test_wilson_interval_holds_the_textbook_values() -> None:
    low, high = wilson_interval(0.5, 100) or (0, 0)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)
    assert wilson_interval(0.5, 0) is None


def test_a_check_that_was_not_measured_is_shown_and_is_no_pass() -> None:
    verdict = judge({"parity": {"mean_kld": 0.001}}, {"mean_kld": 0.01, "accuracy_drop": 0.02})
    assert [check["passed"] for check in verdict["checks"]] == [True, False] and not verdict["passed"]
    assert "value" not in verdict["checks"][1]
    assert "not measured" in render_report({"verdict": verdict})
    assert not judge({"parity": {"mean_kld": 0.001}}, {})["passed"]
