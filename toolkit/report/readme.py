"""`README.md` of a bundle: what it is, what to install, lines of Python that load it, and what was measured of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.chat_template import shipped_template
from toolkit.bundle.genai_config import first_releases
from toolkit.bundle.manifest import Manifest, check_unedited, read_manifest, save_manifest
from toolkit.bundle.reasoning import Reasoning, read_reasoning
from toolkit.bundle.settings import Settings, config_of, read_genai_config, read_settings
from toolkit.errors import BundleError, CheckpointError
from toolkit.figures import FIGURES
from toolkit.files import file_entry, write_text
from toolkit.report.formatting import format_bytes, format_figure
from toolkit.report.sections import Report
from toolkit.soc import SOCS
from toolkit.target import TARGETS, Stage
from toolkit.typed_json import to_json

QUESTION: Final = "Add 4 and 5."
_REPLY: Final = """text = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(text.decode(generator.get_next_tokens()[0]), end="", flush=True)"""
# A bundle without a tokenizer has no words.
_IDS: Final = """for _ in range(32):
    generator.generate_next_token()
    print(generator.get_next_tokens()[0], end=" ", flush=True)"""
_TURNS: Final = (
    "Begin each turn of a conversation with a new `og.Generator` over all of it: a second prompt given to the same one "
    "is answered wrongly by bundles of several stages."
)
_GENAI: Final = "[onnxruntime-genai](https://github.com/microsoft/onnxruntime-genai)"


def write_readme(bundle: Path, report: Report) -> None:
    """Writes a bundle's README.md and its entry in the manifest, unless both are as they would be.

    A manifest that was edited is left as it is, or its digest would vouch for the edit; where a file cannot be read, as
    `verify` and `check` say, the page stays too, so that no report is lost for it.
    """
    if not (bundle / names.MANIFEST_FILE).is_file() or check_unedited(bundle):
        return
    manifest, path = read_manifest(bundle), bundle / names.README_FILE
    try:
        text = readme_text(bundle, manifest, report)
    except BundleError:
        return
    if not (path.is_file() and path.read_bytes() == text.encode("utf-8")):
        write_text(path, text)
    if (entry := file_entry(path)) not in manifest.files:
        save_manifest(bundle / names.MANIFEST_FILE, manifest.with_files([entry]))


def readme_text(bundle: Path, manifest: Manifest, report: Report) -> str:
    """Returns the page in Markdown, from a bundle's own files and its report; nothing in it depends on where it is.

    Raises BundleError for files that cannot be read.
    """
    settings, thought = read_settings(bundle), read_reasoning(bundle)
    has_words = (bundle / names.TOKENIZER_FILE).is_file()
    parts = [
        f"# {' '.join(manifest.recipe.name.split())}",
        _what(manifest),
        "## Use it",
        *_install(manifest, first_releases(config_of(read_genai_config(bundle)).model.type)),
        f"```python\n{_program(bundle, manifest, has_words)}\n```",
        _TURNS,
        "## What to know",
        "\n".join(f"- {line}" for line in _facts(settings, thought, manifest)),
        "## Measured",
        _measured(manifest, report),
    ]
    return "\n\n".join(parts) + "\n"


def model_name(manifest: Manifest) -> str:
    """Returns the model that a bundle was made from: a hub id, or of a folder its name alone, wherever it was."""
    return place_name(manifest.recipe.model)


def place_name(model: str) -> str:
    """Returns a hub id or an embedded model's name as it is, of a folder on some machine its name alone."""
    local = model.count("/") > 1 or "\\" in model or Path(model).is_absolute()
    return model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if local else model


def _what(manifest: Manifest) -> str:
    target = TARGETS[manifest.recipe.target]
    stages = target.stages(manifest.recipe.window, manifest.recipe.parts)
    row, graphs = target.accelerator, f"{len(stages)} ONNX graphs" if len(stages) > 1 else "an ONNX graph"
    random = " **Its weights are random: it is for sizes and speed, and says nothing.**" if manifest.synthetic else ""
    traced = f" Its graph is {names.TRACED}: by torch, from transformers' own code." if manifest.traced else ""
    device = {"cpu": "the CPU", "gpu": "a GPU", "npu": "an NPU"}[row.device]
    if manifest.compiled:
        device = f"the NPU of a {SOCS[manifest.recipe.soc].name}, which its binaries were compiled for"
    return (
        f"`{' '.join(model_name(manifest).split())}` as {graphs} for {_GENAI} on {device} ({row.execution_provider})."
        f"{random}{traced}"
    )


def _install(manifest: Manifest, first: tuple[str, str]) -> Iterator[str]:
    """What the bundle's execution provider comes with, as a command where pip has it; `first` are the releases of
    onnxruntime and onnxruntime-genai from which on it runs."""
    row = TARGETS[manifest.recipe.target].accelerator
    packages = [f"'onnxruntime>={first[0]}'", f"'onnxruntime-genai>={first[1]}'"]
    if row.package and " " in row.package:
        yield f"Its execution provider comes with {row.package}."
        packages = []
    elif row.package:
        packages.append(row.package)
    if packages:
        yield f"    pip install {' '.join(packages)}"
    if row.provider:
        yield (
            "Without the device, `toolkit generate FOLDER --on-cpu --prompt '…'` of "
            "onnx-distill-toolkit runs every stage on the CPU."
        )
    yield "In this folder:"


def _program(bundle: Path, manifest: Manifest, has_words: bool) -> str:
    """Lines of Python that load the bundle from its folder and print an answer."""
    row = TARGETS[manifest.recipe.target].accelerator
    lines = ["import onnxruntime_genai as og", *_registration(row), "", 'model = og.Model(".")']
    if not has_words:
        first = "generator = og.Generator(model, og.GeneratorParams(model))\ngenerator.append_tokens([1, 2, 3])"
        return "\n".join([*lines, first, _IDS])
    lines.append("tokenizer = og.Tokenizer(model)")
    if _has_template(bundle):
        lines += [
            f'messages = \'[{{"role": "user", "content": "{QUESTION}"}}]\'',
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)",
        ]
    else:
        lines.append('prompt = "Once upon a time"  # the model has no chat template')
    lines += [
        "generator = og.Generator(model, og.GeneratorParams(model))",
        "generator.append_tokens(tokenizer.encode(prompt))",
        _REPLY,
    ]
    return "\n".join(lines)


def _registration(row: Stage) -> Iterator[str]:
    """The lines that make a plugin known to onnxruntime-genai."""
    if row.plugin:
        yield f"import {row.plugin}"
        yield ""
        yield (f'og.register_execution_provider_library("{row.execution_provider}", {row.plugin}.get_library_path())')


def _has_template(bundle: Path) -> bool:
    try:
        return shipped_template(bundle) is not None
    except CheckpointError:
        return False


def _facts(settings: Settings, thought: Reasoning | None, manifest: Manifest) -> Iterator[str]:
    """Context, thought, stops and sampling, a line each."""
    context, unasked = settings.context_length, settings.max_length
    less = f", of which an app that does not say how many gets {unasked:,}" if unasked < context else ""
    windows = (
        f"; a prompt is read in windows of {settings.window} and takes up whole ones" if settings.is_pipeline else ""
    )
    yield f"Context: {context:,} tokens, prompt and answer together{less}{windows}."
    if thought is None:
        return
    if thought.begin_of_thought and thought.end_of_thought:
        begin, end = thought.begin_of_thought.text, thought.end_of_thought.text
        opened = (
            f"the prompt ends with `{begin}`, so that what is printed begins inside the thought, and `{end}` ends it"
            if thought.prompt_opens_thought
            else f"it stands between `{begin}` and `{end}`"
        )
        yield f"Thought: {opened}. Leave earlier thoughts out of later turns, as the model was trained."
    else:
        yield "Thought: the model writes none."
    named = ", ".join(f"`{stop.token}` ({stop.id})" if stop.token else str(stop.id) for stop in thought.stop_tokens)
    yield f"Ends an answer: {named or 'nothing but the length'}."
    sampling = to_json(thought.sampling)
    given = ", ".join(f"{key} {value}" for key, value in sampling.items()) if isinstance(sampling, dict) else ""
    yield f"Sampling, as its authors want it and `genai_config.json` has it: {given or 'nothing said, so greedy'}."
    made = ", ".join(f"{name.replace('_', '-')} {version}" for name, version in manifest.versions.items())
    yield f"Made with {made}. `manifest.json` has the SHA-256 of every file, `reasoning.json` what apps need."


def _measured(manifest: Manifest, report: Report) -> str:
    """The figures that the report has, and what to run for the others."""
    size = sum(entry.bytes for entry in manifest.lasting_files())
    rows = [("Size", format_bytes(size))]
    if weights := report.quantization:
        rows.append(("Bits per weight", f"{weights.bits_per_weight:.2f}"))
    if cache := report.kv_cache:
        rows.append(("KV cache when run", f"{format_bytes(cache.bytes)} for {cache.context_length:,} tokens"))
    if parity := report.parity:
        rows += [(_label(key), format_figure(key, getattr(parity, key))) for key in ("mean_kld", "top1_agreement")]
    for task in report.tasks or ():
        theirs = task.reference()
        beside = f" (the checkpoint {theirs.accuracy:.1%})" if theirs else ""
        rows.append((f"{task.name.replace('|', ' ')}, {task.examples} questions", f"{task.accuracy:.1%} right{beside}"))
    if speed := report.speed:
        keys = ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "peak_rss_bytes")
        rows += [(_label(key), format_figure(key, getattr(speed, key))) for key in keys]
        rows.append(("on", f"{report.machine.cpu}, {speed.threads} threads"))
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    if report.parity is None:
        return f"{table}\n\nNot compared with its checkpoint yet: `toolkit validate` does it."
    passed = report.verdict and report.verdict.passed
    verdict = "Every threshold of its recipe is kept" if passed else "**It misses a threshold of its recipe**"
    return f"{table}\n\n{verdict}: `report.html` has all that was measured, and how."


def _label(key: str) -> str:
    return FIGURES[key].label
