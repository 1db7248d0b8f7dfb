"""What a checkpoint or a bundle is, from headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from toolkit import names
from toolkit.bundle.cache import cache_bytes
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.manifest import read_manifest
from toolkit.bundle.operators import bundle_placements
from toolkit.bundle.settings import read_settings
from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.gguf import GgufWeights, is_gguf
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.checkpoint.weights import FileWeights, parameter_count
from toolkit.errors import CheckpointError
from toolkit.graph.interface import read_interface
from toolkit.typed_json import JsonObject, to_json


def inspect_path(path: Path) -> JsonObject:
    """A bundle (it has a manifest) or a checkpoint (it has a config.json); raises CheckpointError for neither."""
    if (path / names.MANIFEST_FILE).is_file():
        return _bundle(path)
    if (path / names.CONFIG_FILE).is_file():
        if not any(path.glob("*.safetensors")):
            return {**_config_facts(read_config(path)), "weights": "none here: the config's facts alone"}
        return inspect_checkpoint(open_checkpoint(path))
    if is_gguf(path):
        return inspect_checkpoint(open_checkpoint(path))
    raise CheckpointError(f"{path} is neither a bundle ({names.MANIFEST_FILE}) nor a checkpoint ({names.CONFIG_FILE})")


def inspect_checkpoint(checkpoint: Checkpoint) -> JsonObject:
    """The config's facts, the dtypes of the tensors, and the files that hold them, here or on the hub."""
    facts, source = _config_facts(checkpoint.config), checkpoint.source
    if isinstance(source, FileWeights | GgufWeights):
        facts["dtypes"] = dict(Counter(source.dtype(name) for name in source.names()))
    if stored := checkpoint.stored_as:
        facts |= {"file_type": stored.file_type, "bits_per_weight": stored.bits_per_weight}
    facts["files"] = [{"name": origin.name, "bytes": origin.bytes} for origin in source.identity()]
    if checkpoint.download_bytes:
        facts["download_bytes"] = checkpoint.download_bytes
    return facts


def _config_facts(config: ModelConfig) -> JsonObject:
    facts: JsonObject = {"kind": "checkpoint", "parameters": parameter_count(config)}
    facts |= asdict(config)
    facts["rope"] = {key: value for key, value in facts["rope"].items() if value is not None}
    structure = facts.pop("structure")
    facts["sliding_layers"] = sum(window is not None for window in structure.pop("sliding_windows"))
    facts["layers_without_rope"] = len(structure.pop("layers_without_rope"))
    facts |= structure
    return facts


def _bundle(folder: Path) -> JsonObject:
    manifest = read_manifest(folder)
    recipe = manifest.recipe
    facts: JsonObject = {
        "kind": "bundle",
        "recipe": recipe.name,
        "model": recipe.model,
        "target": recipe.target,
        "precision": manifest.precision,
        "synthetic": manifest.synthetic,
        "context_length": recipe.context_length,
    }
    facts["stages"] = [
        {"stage": placement.stage, "file": placement.file, "ep": placement.execution_provider, "nodes": placement.nodes}
        for placement in bundle_placements(folder, recipe.target, recipe.window, recipe.parts)
    ]
    operators: Counter[str] = Counter()
    for stage in facts["stages"]:
        operators.update(read_interface(folder / stage["file"]).operators())
    facts["operators"] = dict(sorted(operators.items()))
    facts["kv_cache_bytes"] = cache_bytes(folder, read_settings(folder), recipe.context_length)
    facts["checkpoint"] = to_json(manifest.checkpoint)
    facts["files"] = [{"name": entry.name, "bytes": entry.bytes} for entry in manifest.files]
    facts["problems"] = [{"problem": problem} for problem in lint_bundle(folder)]
    return facts
