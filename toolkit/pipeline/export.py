"""The export story, a line a step: plan, check, pack, author, describe, rename."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolkit import names
from toolkit.bundle.genai_config import genai_config
from toolkit.bundle.manifest import write_manifest
from toolkit.checkpoint.opened import Checkpoint
from toolkit.errors import CheckpointError, RecipeError
from toolkit.graph.decoder import build_decoder, save_graph
from toolkit.machine import package_versions, peak_rss_bytes
from toolkit.partition.pack import pack_weights
from toolkit.pipeline.plan import check_machine, plan_export
from toolkit.recipe import Recipe
from toolkit.report.summary import begin_report, write_report
from toolkit.report.weights import partition_section, quantization_section

_TOKENIZER_FILES = (names.TOKENIZER_FILE, "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_REQUEST_FILE = "request.json"
_JOURNAL_FILE = "journal.jsonl"


class _Clock:
    """Seconds of each named step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stages: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.stages.append({"name": name, "wall_s": time.perf_counter() - begin})


def export_bundle(
    recipe: Recipe,
    checkpoint: Checkpoint,
    out: Path,
    precision: str = "int4",
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """One recipe to one bundle at `out`, resumed from `<out>.partial` if an earlier run left one.

    The bundle ends with a report of the conversion; `judge` adds the proof. Raises ToolkitError before anything is
    written if the checkpoint or the machine will not do.
    """
    clock = _Clock()
    with clock.stage("plan"):
        plan = plan_export(recipe, checkpoint, out, precision)
        config, source = plan.checkpoint.config, plan.checkpoint.source
        graph = build_decoder(config, plan.layout, names.MODEL_DATA_FILE, recipe.context_length)
        tokenizer_files = _tokenizer_files(checkpoint)
        request = {"recipe": asdict(recipe), "precision": precision, "synthetic": checkpoint.synthetic}
        begun_with = {"versions": package_versions(), "checkpoint": source.identity()}
        check_machine(plan, _written_bytes(_partial(out)))
        partial = _open_partial(out, {**request, **begun_with})
    with clock.stage("pack"):
        packed = pack_weights(
            source, plan.layout, partial / names.MODEL_DATA_FILE, partial / _JOURNAL_FILE, progress
        )
    with clock.stage("author"):
        save_graph(graph, partial / names.MODEL_FILE)
        for name in tokenizer_files:
            shutil.copyfile(checkpoint.folder / name, partial / name)
        settings = genai_config(config, checkpoint.folder, recipe.context_length)
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (partial / names.GENAI_CONFIG_FILE).write_text(text, encoding="utf-8", newline="\n")
    with clock.stage("hash"):
        made = [names.MODEL_FILE, names.MODEL_DATA_FILE, names.GENAI_CONFIG_FILE, *tokenizer_files]
        known = {names.MODEL_DATA_FILE: packed.sha256}
        manifest = write_manifest(partial, made, {**request, "checkpoint": source.digests()}, known)
    report = begin_report(manifest)
    report["quantization"] = quantization_section(plan.layout, packed.errors)
    report["partition"] = partition_section(len(graph.graph), recipe)
    report["conversion"] = {
        "wall_s": time.perf_counter() - clock.start,
        "peak_rss_bytes": peak_rss_bytes(),
        "bytes_read": sum(int(str(entry.get("bytes", 0))) for entry in source.digests()),
        "bytes_written": sum(entry["bytes"] for entry in manifest["files"]),
        "stages": clock.stages,
    }
    write_report(partial, report)
    _replace(out, partial)
    return out


def _tokenizer_files(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.synthetic:
        return []
    if not (checkpoint.folder / names.TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{checkpoint.folder} has no {names.TOKENIZER_FILE}: onnxruntime-genai needs it")
    return [name for name in _TOKENIZER_FILES if (checkpoint.folder / name).is_file()]


def _open_partial(out: Path, request: Mapping[str, object]) -> Path:
    """The work folder; emptied unless it was begun by the same request on the same checkpoint."""
    if _old(out).exists() and not out.exists():
        os.replace(_old(out), out)
    shutil.rmtree(_old(out), ignore_errors=True)
    if out.exists() and not (out / names.MANIFEST_FILE).is_file():
        raise RecipeError(f"{out} exists and is not a bundle: name another --out, it will not be overwritten")
    partial = _partial(out)
    text = json.dumps(request)
    marker = partial / _REQUEST_FILE
    if not (marker.is_file() and marker.read_text(encoding="utf-8") == text):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        marker.write_text(text, encoding="utf-8")
    return partial


def _written_bytes(partial: Path) -> int:
    """Bytes an interrupted run already holds on the disk; a sparse file's holes do not count where that is known."""
    data = partial / names.MODEL_DATA_FILE
    if not data.exists():
        return 0
    stat = data.stat()
    return int(getattr(stat, "st_blocks", stat.st_size // 512) * 512)


def _replace(out: Path, partial: Path) -> None:
    """The finished bundle in place of an older one; a kill between two lines leaves the old or the new one whole."""
    for name in (_JOURNAL_FILE, _REQUEST_FILE):
        (partial / name).unlink()
    if out.exists():
        os.replace(out, _old(out))
    os.replace(partial, out)
    shutil.rmtree(_old(out), ignore_errors=True)


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _old(out: Path) -> Path:
    return out.with_name(out.name + ".old")
