"""What a checkpoint or a bundle is, from headers alone: typed, and as the JSON object that `toolkit inspect` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit import names
from toolkit.bundle.cache import cache_bytes
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.manifest import Manifest, read_manifest
from toolkit.bundle.operators import Placement, bundle_placements
from toolkit.bundle.settings import read_settings
from toolkit.checkpoint.config import ModelConfig, read_config
from toolkit.checkpoint.gguf import GgufWeights, is_gguf
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.checkpoint.stored_as import StoredAs
from toolkit.checkpoint.weights import FileWeights, Origin, parameter_count
from toolkit.errors import CheckpointError
from toolkit.graph.interface import read_interface
from toolkit.typed_json import Json, to_json


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint is: its config with every default filled in, and of its weights the number of parameters, the
    files that hold them and how many tensors have each dtype. `files` is empty where a folder holds a config alone;
    `stored_as` is a GGUF file's, `download_bytes` is 0 for what is here already."""

    config: ModelConfig
    parameters: int
    files: tuple[Origin, ...] = ()
    dtypes: Mapping[str, int] | None = None
    stored_as: StoredAs | None = None
    download_bytes: int = 0

    def as_json(self) -> Mapping[str, Json]:
        """The facts as `toolkit inspect --json` prints them: the config's keys beside the others, layers counted."""
        config = asdict(self.config)
        rope = {key: value for key, value in config["rope"].items() if value is not None}
        structure = config.pop("structure")
        sliding, without_rope = structure.pop("sliding_windows"), structure.pop("layers_without_rope")
        return {
            "kind": "checkpoint",
            "parameters": self.parameters,
            **config,
            "rope": rope,
            "sliding_layers": sum(window is not None for window in sliding),
            "layers_without_rope": len(without_rope),
            **structure,
            **self._weights(),
        }

    def _weights(self) -> Mapping[str, Json]:
        if not self.files:
            return {"weights": "none here: the config's facts alone"}
        found: dict[str, Json] = {} if self.dtypes is None else {"dtypes": self.dtypes}
        if stored := self.stored_as:
            found |= {"file_type": stored.file_type, "bits_per_weight": stored.bits_per_weight}
        found["files"] = [{"name": file.name, "bytes": file.bytes} for file in self.files]
        return found | ({"download_bytes": self.download_bytes} if self.download_bytes else {})


@dataclass(frozen=True)
class BundleFacts:
    """What a bundle is: its manifest, its stages beside the table of what their providers take, how often each op type
    stands in its graphs, the bytes of its KV cache at full length, and what the linter says of it."""

    manifest: Manifest
    stages: tuple[Placement, ...]
    operators: Mapping[str, int]
    kv_cache_bytes: int
    problems: tuple[str, ...]

    def as_json(self) -> Mapping[str, Json]:
        """The facts as `toolkit inspect --json` prints them."""
        manifest, recipe = self.manifest, self.manifest.recipe
        return {
            "kind": "bundle",
            "recipe": recipe.name,
            "model": recipe.model,
            "target": recipe.target,
            "precision": manifest.precision,
            "synthetic": manifest.synthetic,
            "context_length": recipe.context_length,
            "stages": [
                {"stage": stage.stage, "file": stage.file, "ep": stage.execution_provider, "nodes": stage.nodes}
                for stage in self.stages
            ],
            "operators": self.operators,
            "kv_cache_bytes": self.kv_cache_bytes,
            "checkpoint": to_json(manifest.checkpoint),
            "files": [{"name": entry.name, "bytes": entry.bytes} for entry in manifest.files],
            "problems": [{"problem": problem} for problem in self.problems],
        }


def inspect_path(path: Path) -> CheckpointFacts | BundleFacts:
    """Looks at a bundle (it has a manifest) or a checkpoint (it has a config.json); raises CheckpointError for what is
    neither."""
    if (path / names.MANIFEST_FILE).is_file():
        return _inspect_bundle(path)
    if (path / names.CONFIG_FILE).is_file():
        if not any(path.glob("*.safetensors")):
            config = read_config(path)
            return CheckpointFacts(config, parameter_count(config))
        return inspect_checkpoint(open_checkpoint(path))
    if is_gguf(path):
        return inspect_checkpoint(open_checkpoint(path))
    raise CheckpointError(f"{path} is neither a bundle ({names.MANIFEST_FILE}) nor a checkpoint ({names.CONFIG_FILE})")


def inspect_checkpoint(checkpoint: Checkpoint) -> CheckpointFacts:
    """Looks at an open checkpoint, whose files may be here or on the hub."""
    source = checkpoint.source
    dtypes: dict[str, int] | None = None
    if isinstance(source, FileWeights | GgufWeights):
        dtypes = dict(Counter(source.dtype(name) for name in source.names()))
    return CheckpointFacts(
        checkpoint.config,
        parameter_count(checkpoint.config),
        source.identity(),
        dtypes,
        checkpoint.stored_as,
        checkpoint.download_bytes,
    )


def _inspect_bundle(folder: Path) -> BundleFacts:
    manifest = read_manifest(folder)
    recipe = manifest.recipe
    stages = tuple(bundle_placements(folder, recipe.target, recipe.window, recipe.parts))
    operators: Counter[str] = Counter()
    for stage in stages:
        operators.update(read_interface(folder / stage.file).operators())
    cache = cache_bytes(folder, read_settings(folder), recipe.context_length)
    return BundleFacts(manifest, stages, dict(sorted(operators.items())), cache, tuple(lint_bundle(folder)))
