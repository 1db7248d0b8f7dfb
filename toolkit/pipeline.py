"""The export story, a line a step: check, plan, pack, author, describe, rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from toolkit import names
from toolkit.bundle.genai_config import genai_config
from toolkit.bundle.manifest import file_entry, write_manifest
from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.weights import open_weights
from toolkit.errors import CheckpointError, MachineError, RecipeError
from toolkit.graph.decoder import build_decoder, save_graph
from toolkit.graph.layout import Layout, plan_layout
from toolkit.partition.pack import pack_weights
from toolkit.recipe import Recipe

_TOKENIZER_FILES = (names.TOKENIZER_FILE, "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_REQUEST_FILE = "request.json"
_JOURNAL_FILE = "journal.txt"


def export_bundle(recipe: Recipe, folder: Path, out: Path, precision: str) -> Path:
    """One recipe to one bundle at `out`, resumed from `<out>.partial` if an earlier run left one.

    Raises ToolkitError before anything is written if the checkpoint or the machine will not do.
    """
    config = read_config(folder)
    _check_context(config, recipe)
    source = open_weights(folder, config)
    if not (folder / names.TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{folder} has no {names.TOKENIZER_FILE}: onnxruntime-genai needs it")
    layout = plan_layout(config, recipe if precision == "int4" else None)
    graph = build_decoder(config, layout, names.MODEL_DATA_FILE, recipe.context_length)
    _check_disk(out, layout)
    request = {
        "recipe": asdict(recipe),
        "precision": precision,
        "checkpoint": [file_entry(path) for path in source.files()],
    }
    partial = _open_partial(out, request)
    pack_weights(source, layout, partial / names.MODEL_DATA_FILE, partial / _JOURNAL_FILE)
    save_graph(graph, partial / names.MODEL_FILE)
    copied = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    for name in copied:
        shutil.copyfile(folder / name, partial / name)
    settings = json.dumps(genai_config(config, folder, recipe.context_length), indent=2, ensure_ascii=False)
    (partial / names.GENAI_CONFIG_FILE).write_text(settings + "\n", encoding="utf-8", newline="\n")
    made = [names.MODEL_FILE, names.MODEL_DATA_FILE, names.GENAI_CONFIG_FILE, *copied]
    write_manifest(partial, made, request)
    for name in (_JOURNAL_FILE, _REQUEST_FILE):
        (partial / name).unlink()
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    return out


def _open_partial(out: Path, request: Mapping[str, object]) -> Path:
    """The work folder; emptied unless it was begun by the same request on the same checkpoint."""
    if out.exists() and not (out / names.MANIFEST_FILE).is_file():
        raise RecipeError(f"{out} exists and is not a bundle: name another --out, it will not be overwritten")
    partial = out.with_name(out.name + ".partial")
    text = json.dumps(request)
    marker = partial / _REQUEST_FILE
    if not (marker.is_file() and marker.read_text(encoding="utf-8") == text):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        marker.write_text(text, encoding="utf-8")
    return partial


def _check_context(config: ModelConfig, recipe: Recipe) -> None:
    if recipe.context_length > config.max_position_embeddings:
        raise RecipeError(
            f"context_length {recipe.context_length} is more than the checkpoint's max_position_embeddings "
            f"{config.max_position_embeddings}: lower it in the recipe"
        )


def _check_disk(out: Path, layout: Layout) -> None:
    existing = next(p for p in out.resolve().parents if p.exists())
    free = shutil.disk_usage(existing).free
    if free < layout.nbytes * 1.02 + (64 << 20):
        raise MachineError(f"{existing} has {free >> 20} MiB free, the bundle needs {layout.nbytes >> 20} MiB")
