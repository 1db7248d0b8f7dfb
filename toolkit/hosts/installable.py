"""A finished bundle as a host of models would take it: its name there, its files, its prompt, what it may lack."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.chat_template import additional_special_tokens, shipped_template, special_tokens
from toolkit.bundle.lint import lint_bundle
from toolkit.bundle.manifest import Manifest, read_manifest
from toolkit.bundle.reasoning import Reasoning, read_reasoning
from toolkit.bundle.settings import Settings, read_settings
from toolkit.bundle.speculative import SPECULATION_FILE
from toolkit.bundle.template_jinja import compile_template, render
from toolkit.errors import BundleError, CheckpointError
from toolkit.target import CPU_EP, TARGETS, Target

# What stands for the question in a prompt, as hosts write it.
CONTENT: Final = "{Content}"
# How hosts call an execution provider at the end of a model's name.
PROVIDER_NAMES: Final = {
    CPU_EP: "generic-cpu",
    "DmlExecutionProvider": "directml-gpu",
    "OpenVINOExecutionProvider": "openvino-npu",
    "QNNExecutionProvider": "qnn-npu",
    "VitisAIExecutionProvider": "vitis-npu",
    "WebGpuExecutionProvider": "webgpu-gpu",
}
# A folder with a manifest.json was a model package to some builds of onnxruntime-genai, and reports are the maker's.
_OURS: Final = (
    names.MANIFEST_FILE,
    names.REPORT_FILE,
    names.REPORT_PAGE_FILE,
    names.COMPILE_LOG_FILE,
    SPECULATION_FILE,
)


@dataclass(frozen=True)
class Installable:
    """A bundle that runs and has words: `files` are those that a device needs, `prompt` is one question in the chat
    template with `{Content}` for it, None where there is no template."""

    folder: Path
    manifest: Manifest
    settings: Settings
    thought: Reasoning | None
    prompt: str | None
    files: tuple[str, ...]

    @property
    def target(self) -> Target:
        """The row of the target that the bundle was made for."""
        return TARGETS[self.manifest.recipe.target]

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of the execution provider that runs the transformer."""
        return self.target.accelerator.execution_provider

    @property
    def model(self) -> str:
        """A short name of the model, of letters, digits, dots and dashes, without the target."""
        recipe = self.manifest.recipe
        split = "-split" if self.target.partitioned and self.provider == CPU_EP else ""
        return plain_name(recipe.name.removesuffix(f"-{recipe.target}")) + split

    @property
    def name(self) -> str:
        """The name with the execution provider, by which hosts choose it."""
        return f"{self.model}-{PROVIDER_NAMES[self.provider]}"

    @property
    def thinks(self) -> tuple[str, str] | None:
        """The markers around a thought; None for a model that does not think."""
        if self.thought is None or not (self.thought.begin_of_thought and self.thought.end_of_thought):
            return None
        return self.thought.begin_of_thought.text, self.thought.end_of_thought.text

    def bytes(self) -> int:
        """How many bytes its files have."""
        sizes = {entry.name: entry.bytes for entry in self.manifest.files}
        return sum(sizes[name] for name in self.files)


def plain_name(word: str) -> str:
    """Returns a word as every host takes it for a name: lower case, runs of anything else than letters, digits and dots
    as one dash. Raises BundleError where nothing is left."""
    made = re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.")
    if not made:
        raise BundleError(f"{word!r} leaves no letter or digit for a name: give another with --name")
    return made


def read_installable(bundle: Path) -> Installable:
    """Reads a bundle. Raises BundleError for a folder that is none, one that `check` finds fault with, and one without
    a tokenizer, which no host could talk to."""
    manifest, settings = read_manifest(bundle), read_settings(bundle)
    if manifest.synthetic or not (bundle / names.TOKENIZER_FILE).is_file():
        raise BundleError(f"{bundle} has no words, as bundles of random weights have none: a host could not talk to it")
    if problems := lint_bundle(bundle):
        raise BundleError(f"{bundle} would not run in a host: {problems[0]}: see `toolkit check {bundle}`")
    files = _needed(manifest, settings)
    for name in files:
        if not (bundle / name).is_file():
            raise BundleError(f"{bundle / name} is missing: see `toolkit verify {bundle}`")
    return Installable(bundle, manifest, settings, read_reasoning(bundle), _prompt(bundle), files)


def _needed(manifest: Manifest, settings: Settings) -> tuple[str, ...]:
    """The files that a device needs: of a compiled bundle not the graphs that were compiled, nor their weights."""
    run = {stage.filename for stage in settings.stages}
    spare = {names.TRANSFORMER_DATA_FILE} if manifest.compiled else set()
    # Hosts read genai_config.json alone: what guesses for the model would lie there idle.
    listed = [name for entry in manifest.files if not names.is_draft(name := Path(entry.name).name)]
    return tuple(
        name for name in listed if name not in (*_OURS, *spare) and (not name.endswith(".onnx") or name in run)
    )


def _prompt(bundle: Path) -> str | None:
    """One question in the chat template, as transformers would write it."""
    try:
        shipped = shipped_template(bundle)
        if shipped is None:
            return None
        tokens = {**special_tokens(bundle), "additional_special_tokens": additional_special_tokens(bundle)}
        return render(compile_template(shipped.text), [{"role": "user", "content": CONTENT}], tokens)
    except CheckpointError as problem:
        raise BundleError(f"{bundle}: {problem}") from None
    except Exception as problem:  # whatever a template raises
        raise BundleError(f"{bundle}: its chat template fails on a question: {str(problem)[:200]}") from None
