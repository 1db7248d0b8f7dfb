"""Whether a bundle is as it was made: its files by the manifest, manifest and reports by their own digests, and nothing
beside them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.manifest import Manifest, read_manifest, verify_manifest
from toolkit.errors import BundleError, ToolkitError
from toolkit.files import BEING_WRITTEN, digest_fits, read_json
from toolkit.report.readme import readme_text
from toolkit.report.sections import Report
from toolkit.typed_json import from_json

_MAX_BYTES: Final = 256 << 20
_MARK: Final = re.compile(rb"<!-- sha256 of the page above: ([0-9a-f]{64}) -->\n\Z")
# What programs that keep or serve models put into a bundle's folder.
_OF_HOSTS: Final = ("inference_model.json", "download.tmp", "README.md", "LICENSE", ".gitattributes")


@dataclass(frozen=True)
class Verified:
    """What is not as it was made, a line each, and notes of files that hosts of models put beside."""

    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def page_with_digest(page: str) -> str:
    """The page with a comment at its end that holds the SHA-256 of what stands before it."""
    page = page if page.endswith("\n") else page + "\n"
    return f"{page}<!-- sha256 of the page above: {hashlib.sha256(page.encode('utf-8')).hexdigest()} -->\n"


def verify_bundle(bundle: Path) -> Verified:
    """Holds a bundle's files against what was written of them. Raises BundleError if there is no readable manifest."""
    manifest = read_manifest(bundle)
    known = {entry.name for entry in manifest.files} | {names.MANIFEST_FILE}
    known |= {names.REPORT_FILE, names.REPORT_PAGE_FILE, names.COMPILE_LOG_FILE}
    there = sorted(path.name for path in bundle.iterdir() if path.name not in known)
    ours = {*known, names.REQUEST_FILE}
    left = [name for name in there if name.removesuffix(BEING_WRITTEN).removesuffix(BEING_WRITTEN) in ours]
    extra = [name for name in there if name not in left]
    problems = [*verify_manifest(bundle), *report_problems(bundle, manifest)]
    if _readme_is_newer(bundle, manifest):
        problems = [line for line in problems if not line.startswith(f"{names.README_FILE} ")]
    problems += [f"{name} is extra: the manifest does not name it" for name in extra if name not in _OF_HOSTS]
    notes = [f"{name} is extra, put there by a program that keeps models" for name in extra if name in _OF_HOSTS]
    notes += [f"{name} is left of a command that was killed, and goes with the same command" for name in left]
    if bundle.with_name(f"{bundle.name}.compile").is_dir():
        notes.append(f"compiling it was stopped: `toolkit compile {bundle}` goes on")
    return Verified(tuple(problems), tuple(notes))


def _readme_is_newer(bundle: Path, manifest: Manifest) -> bool:
    """Whether README.md is what the report makes of it, whatever the manifest says: a kill came between the two."""
    try:
        raw = read_json(bundle / names.REPORT_FILE, _MAX_BYTES, BundleError, "no report")
        text = readme_text(bundle, manifest, from_json(Report, raw))
        return (bundle / names.README_FILE).read_bytes() == text.encode("utf-8")
    except (ToolkitError, ValueError, OSError):
        return False


def report_problems(bundle: Path, manifest: Manifest) -> Iterator[str]:
    """A line for each of a bundle's two reports that is not as it was written, or is another bundle's."""
    again, digested = f"`toolkit validate {bundle}` writes it anew", False
    try:
        raw = read_json(bundle / names.REPORT_FILE, _MAX_BYTES, BundleError, again)
    except BundleError as problem:
        yield str(problem)
    else:
        digested = "digest" in raw
        if not digest_fits(raw):
            yield f"{names.REPORT_FILE} was changed after it was written: {again}"
        elif raw.get("recipe") != manifest.recipe.name or raw.get("target") != manifest.recipe.target:
            yield f"{names.REPORT_FILE} is another bundle's, of {str(raw.get('recipe'))[:80]}: {again}"
    page = bundle / names.REPORT_PAGE_FILE
    if not page.is_file():
        yield f"{names.REPORT_PAGE_FILE} is missing: {again}"
        return
    content = page.read_bytes()
    mark = _MARK.search(content)
    fits = mark and hashlib.sha256(content[: mark.start()]).hexdigest() == mark[1].decode("ascii")
    if not fits and (mark or digested):
        yield f"{names.REPORT_PAGE_FILE} was changed after it was written: {again}"
