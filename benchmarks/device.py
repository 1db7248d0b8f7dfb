"""What calibrating and validating cost on a device: `python -m benchmarks.device --device cuda`.

Some layers of each distill's true shape, with random weights and 4,096 rows of vocabulary, are exported and validated
at each quality. The table has, of each: seconds a layer, minutes of all the layers that the model has and of the head's
4,096 rows, what a dry run announces for these, the peak of memory, and the bundle's mean KLD beside plain rounding's.
Random weights have no salient channels and random ids no meaning: the KLD says that the solver works, not what a user
gets.

On `cpu` a layer is surveyed while the one before it is solved, so that an export of one layer fewer is measured too:
a layer is the difference. Memory is the process' own there, so that of one model is known by a run of its own:
`python -m benchmarks.device --device cpu --models 14b --qualities balanced`; elsewhere it is what torch counts.

`--toy` takes a model of two narrow layers and few tokens instead: seconds on any device.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import toolkit
from toolkit.device.chosen import chosen_device
from toolkit.device.words import CPU
from toolkit.machine import peak_rss_bytes
from toolkit.pipeline.described import described_with_costs
from toolkit.pipeline.plan import ExportPlan

ROOT: Final = Path(__file__).resolve().parent.parent
WORK: Final = ROOT / "build" / "device"
DISTILLS: Final = ("1.5b", "7b", "14b", "70b")
_NARROW: Final = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
_TOY_TOKENS: Final = 1024
_HEADS: Final = (
    "device",
    "model",
    "quality",
    "tokens",
    "survey s",
    "solve s",
    "whole min",
    "announced min",
    "validate s",
    "GB",
    "announced GB",
    "KLD",
    "rtn KLD",
)


@dataclass(frozen=True)
class Measured:
    """One export and its validation; seconds of the survey and the solver are those of a layer, both in `solve_s` where
    they go on side by side. `whole_s` is what both take of all the model's layers and the small head, and `announced_s`
    and `announced_bytes` what that was foreseen to take."""

    device: str
    model: str
    quality: str
    tokens: int
    survey_s: float | None
    solve_s: float
    whole_s: float
    announced_s: float
    validate_s: float
    peak_bytes: int
    announced_bytes: int
    mean_kld: float
    rounded_kld: float | None

    def cells(self) -> list[str]:
        """The row of the table."""
        plain = "" if self.rounded_kld is None else f"{self.rounded_kld:.4f}"
        minutes = [f"{seconds / 60:.1f}" for seconds in (self.whole_s, self.announced_s)]
        survey = "beside" if self.survey_s is None else f"{self.survey_s:.2f}"
        seconds = [survey, f"{self.solve_s:.2f}", *minutes, f"{self.validate_s:.1f}"]
        found = [f"{self.peak_bytes / 1e9:.1f}", f"{self.announced_bytes / 1e9:.1f}", f"{self.mean_kld:.4f}", plain]
        return [self.device, self.model, self.quality, str(self.tokens), *seconds, *found]


@dataclass(frozen=True)
class Exported:
    """A bundle of some layers with the plan it was made by, the seconds of each kind of step, and the peak of memory by
    then: of the device, or of this process where that is the device."""

    plan: ExportPlan
    bundle: Path
    seconds: Mapping[str, float]
    peak_bytes: int

    @property
    def whole_s(self) -> float:
        """What calibrating took."""
        return sum(self.seconds.values())


def shape_of(model: str, layers: int, toy: bool) -> Path:
    """A folder with the config of a distill cut to some layers."""
    config = _config(model)
    config |= {"num_hidden_layers": layers, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 1}
    config |= {**_NARROW, "head_dim": 64} if toy else {}
    config.pop("pad_token_id", None)
    folder = WORK / "shapes" / f"{'toy-' if toy else ''}{layers}-layers-of-{model}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def planned(model: str, quality: str, layers: int, toy: bool) -> list[ExportPlan]:
    """The plan of an export of so many layers."""
    changes = ["context_length=512", *([f"calibration_tokens={_TOY_TOKENS}"] if toy else [])]
    folder, out = shape_of(model, layers, toy), WORK / "bundle"
    return toolkit.plan("cpu", checkpoint=folder, out=out, synthetic=True, quality=quality, changes=changes)


def exported(model: str, quality: str, device: str, layers: int, toy: bool) -> Exported:
    """One export, timed step by step."""
    for stale in (WORK / "bundle", WORK / "bundle.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    plans = planned(model, quality, layers, toy)
    _forget_peak(device)
    clock = _Clock()
    bundles = toolkit.export(plans, device=device, progress=clock.hear, note=said)
    return Exported(plans[0], bundles[0], clock.seconds, _peak_bytes(device))


def measured(model: str, quality: str, device: str, layers: int, toy: bool) -> Measured:
    """One export with its validation, timed."""
    whole = _config(model)["num_hidden_layers"]
    fewer = exported(model, quality, device, layers - 1, toy) if device == CPU else None
    made = exported(model, quality, device, layers, toy)
    survey_s, solve_s = (made.seconds[f"{step} layer"] / layers for step in ("calibrated", "solved"))
    layer_s = made.whole_s - fewer.whole_s if fewer else survey_s + solve_s
    start = time.perf_counter()
    effort = toolkit.Effort(tokens=512, tasks=False, speed=False, baseline=True)
    report = toolkit.validate(made.bundle, made.plan.opened, effort, device=device, progress=said, note=said)
    validate_s = time.perf_counter() - start
    calibration = report.quantization.calibration if report.quantization else None
    if calibration is None or report.parity is None:
        raise SystemExit(f"{model} {quality}: nothing was calibrated or compared")
    (shown,) = described_with_costs(planned(model, quality, whole, toy), None, on=chosen_device(device))
    return Measured(
        device,
        model,
        quality,
        calibration.tokens,
        None if fewer else survey_s,
        layer_s if fewer else solve_s,
        made.whole_s + (whole - layers) * layer_s,
        sum(phase.forecast_s for phase in shown.forecast or () if phase.phase == "calibrate"),
        validate_s,
        made.peak_bytes,
        shown.peak_memory_bytes,
        report.parity.mean_kld,
        report.baseline.mean_kld if report.baseline else None,
    )


def _config(model: str) -> dict[str, Any]:
    """The config of a distill."""
    config: dict[str, Any] = json.loads((ROOT / "models" / model / "config.json").read_text(encoding="utf-8"))
    return config


class _Clock:
    """Seconds of each kind of step by the line that says it is done: `calibrated layer`, `solved head`."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def hear(self, line: str) -> None:
        """Counts what has passed since the line before; a progress line may say how far the work is in front."""
        now = time.perf_counter()
        if found := re.search("(calibrated|solved) (layer|head)", line):
            self.seconds[found[0]] += now - self._last
        self._last = now
        said(line)


def _module(device: str) -> Any:
    """torch's module of a GPU, which counts its memory; None of what has none."""
    kind = device.partition(":")[0]
    if kind not in ("cuda", "xpu"):
        return None
    import torch

    return getattr(torch, kind)


def _forget_peak(device: str) -> None:
    if module := _module(device):
        module.reset_peak_memory_stats()


def _peak_bytes(device: str) -> int:
    module = _module(device)
    return int(module.max_memory_allocated()) if module else peak_rss_bytes() if device == CPU else 0


def _card(device: str) -> str:
    module = _module(device)
    return str(module.get_device_name()) if module else chosen_device(device).software


def said(line: str) -> None:
    """Says a line to who watches, apart from the table."""
    print(line, file=sys.stderr, flush=True)


def print_row(cells: Sequence[str]) -> None:
    """Prints a row of a Markdown table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Prints a row as each is measured, so that what a card's minutes did not suffice for is all that is lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", nargs="+", default=["cuda"], help="one or several, as `toolkit export --device`")
    parser.add_argument("--models", nargs="+", choices=DISTILLS, default=list(DISTILLS))
    parser.add_argument("--qualities", nargs="+", choices=("balanced", "best"), default=["balanced", "best"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--toy", action="store_true")
    asked = parser.parse_args()
    if CPU in asked.device and asked.layers < 2:
        parser.error("a layer on the cpu is what two take more than one: --layers 2 or more")
    names = [chosen_device(device).name for device in asked.device]
    for name in names:
        print(f"{name}: {_card(name)}", flush=True)
        # What a first use loads and compiles is no layer's.
        measured(asked.models[0], "balanced", name, 2 if name == CPU else 1, toy=True)
    print_row(_HEADS)
    print_row(["---"] * len(_HEADS))
    for model in asked.models:
        for quality in asked.qualities:
            for name in names:
                print_row(measured(model, quality, name, asked.layers, asked.toy).cells())


if __name__ == "__main__":
    main()
