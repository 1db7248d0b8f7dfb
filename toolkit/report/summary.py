"""report.json and report.html of a bundle, written and read back; what is absent is named with its reason."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.bundle.manifest import Manifest
from toolkit.errors import BundleError
from toolkit.files import read_json, with_digest, write_json, write_text
from toolkit.machine import this_machine
from toolkit.report.intact import page_with_digest
from toolkit.report.page import render_report
from toolkit.report.readme import write_readme
from toolkit.report.sections import NotMeasured, Report
from toolkit.typed_json import field_kinds, from_json, read_value, to_json

SCHEMA_VERSION: Final = 1
_MAX_BYTES: Final = 256 << 20
# Every section that a bundle may lack, with the reason it lacks it unless a run says better.
_OPTIONAL: Final = {
    "conversion": "the bundle was not made by this toolkit's export",
    "quantization": "the bundle was not made by this toolkit's export",
    "partition": "the bundle was not made by this toolkit's export",
    "parity": "not validated yet: run `toolkit validate`",
    "baseline": "the recipe does not ask for plain 4-bit rounding to be measured beside",
    "tasks": "the recipe names no tasks",
    "speed": "not validated yet: run `toolkit validate`",
    "simulator": "not validated yet, or the target has no simulator",
    "ceiling": "this target's memory bandwidth is not known",
}
# What measuring anew leaves as it is.
_KEPT: Final = ("conversion", "quantization", "partition", "kv_cache", "ceiling")


def begin_report(manifest: Manifest) -> Report:
    """A report of identity, date and machine alone, from the bundle's manifest."""
    recipe, created = manifest.recipe, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    identity = (SCHEMA_VERSION, recipe.model, recipe.target, recipe.name, manifest.synthetic)
    form = names.TRACED if manifest.traced else None
    return Report(*identity, created, this_machine(), not_measured=(), form=form)


def read_report(bundle: Path, manifest: Manifest) -> Report:
    """The bundle's report, redated, to be measured anew: what making the bundle took and made of it is kept, each
    section that can be read."""
    fresh, kept = begin_report(manifest), dict[str, Any]()
    try:
        raw = read_json(bundle / names.REPORT_FILE, _MAX_BYTES, BundleError, "no report")
    except BundleError:
        return fresh
    kinds = field_kinds(Report)
    for name in _KEPT:
        try:
            if name in raw:
                kept[name] = read_value(kinds[name][1], raw[name], name)
        except ValueError:
            continue
    return replace(fresh, **kept)


def load_report(bundle: Path) -> Report:
    """The bundle's report as it stands. Raises BundleError if there is none to read."""
    return _loaded(bundle / names.REPORT_FILE, f"`toolkit validate {bundle}` makes it anew")


def load_report_at(place: Path) -> Report:
    """The report of a bundle's folder, or that of a file which is one. Raises BundleError if there is none to read."""
    if place.is_dir():
        return load_report(place)
    return _loaded(place, "expected a bundle's folder or its report.json")


def _loaded(path: Path, hint: str) -> Report:
    try:
        return from_json(Report, read_json(path, _MAX_BYTES, BundleError, hint), str(path))
    except ValueError as problem:
        raise BundleError(f"{problem}: {hint}") from None


def validated_report(bundle: Path) -> Report | None:
    """The report of a bundle that was compared with its checkpoint; None where it was not, or has none to read."""
    try:
        report = load_report(bundle)
    except BundleError:
        return None
    return report if report.parity and report.verdict else None


def amend_report(bundle: Path, change: Callable[[Report], Report], reasons: Iterable[NotMeasured] = ()) -> Report:
    """The bundle's report with `change` made to it and nothing measured anew; returns it as written.

    Raises BundleError if there is none to read.
    """
    report = load_report(bundle)
    absent = {entry.name: entry for entry in (*report.not_measured, *reasons)}
    report = change(report)
    if any(row.compiled for row in report.partition or ()):
        absent.pop("partition.bin_bytes", None)
    return write_report(bundle, report, absent.values())


def write_report(bundle: Path, report: Report, reasons: Iterable[NotMeasured] = ()) -> Report:
    """Writes report.json and report.html, and the README.md of a bundle after them; returns the report as written.

    Sections that are absent are named in `not_measured` with their reason; `reasons` may name single figures too.
    """
    given = {**_OPTIONAL, **{entry.name: entry.reason for entry in reasons}}
    absent = (NotMeasured(name, reason) for name, reason in given.items() if getattr(report, name, None) is None)
    whole = replace(report, not_measured=tuple(absent), digest=None)
    raw = with_digest(to_json(whole))
    whole = replace(whole, digest=raw["digest"])
    write_json(bundle / names.REPORT_FILE, raw)
    write_text(bundle / names.REPORT_PAGE_FILE, page_with_digest(render_report(whole)))
    write_readme(bundle, whole)
    return whole
