"""What is damaged, and the commands that read it: a row a parser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

_PLACED: Final = ("--checkpoint", "{checkpoint}", "--out", "{out}", "--no-validate")
EXPORT: Final = ("export", "cpu", *_PLACED, "--quality", "fast", "--set", "context_length=64")
RESUMED: Final = (
    *("export", "cpu", *_PLACED),
    *("--quality", "best", "--calibration", "{text}", "--set", "context_length=64", "--set", "calibration_tokens=300"),
)
GENERATE: Final = ("generate", "{bundle}", "--prompt", "the cat", "--max-new-tokens", "2")
_VALIDATE: Final = (
    *("validate", "{bundle}", "--checkpoint", "{checkpoint}", "--tokens", "20", "--no-speed", "--no-simulate"),
    *("--max-new-tokens", "2", "--examples", "1", "--no-tasks", "--no-baseline"),
)


@dataclass(frozen=True)
class Parser:
    """`files` of the sandbox, one of which is damaged; `commands`, of which each reads it; `share` of all mutants.

    `words` are damaged texts of the command line instead, put where `{value}` is. `form` says how places of the files
    can be changed one by one: those of JSON, of a header, or none ("bytes"); `on` is the part of the sandbox that the
    commands change.
    """

    name: str
    files: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    share: float
    form: Literal["json", "safetensors", "gguf", "bytes"] = "json"
    on: str = "out"
    words: tuple[str, ...] = ()


_BUNDLE_COMMANDS: Final = (("check", "{bundle}"), ("verify", "{bundle}"), ("inspect", "{bundle}"))
_ADAPTED: Final = (*EXPORT, "--adapter", "{adapter}")
_FROM_GGUF: Final = tuple("{gguf}" if word == "{checkpoint}" else word for word in EXPORT)
_COMPILE: Final = ("compile", "{pipeline}")
_SHARD: Final = "checkpoint/model-00001-of-00002.safetensors"

PARSERS: Final[tuple[Parser, ...]] = (
    Parser("safetensors", (_SHARD,), (EXPORT,), 0.16, "safetensors"),
    Parser("gguf", ("model.gguf",), (_FROM_GGUF,), 0.05, "gguf"),
    Parser("index", ("checkpoint/model.safetensors.index.json",), (EXPORT,), 0.08),
    Parser("config", ("checkpoint/config.json",), (EXPORT,), 0.12),
    Parser("generation_config", ("checkpoint/generation_config.json",), (EXPORT,), 0.06),
    Parser("tokenizer", ("checkpoint/tokenizer.json",), (EXPORT,), 0.04),
    Parser("tokenizer_config", ("checkpoint/tokenizer_config.json",), (EXPORT,), 0.03),
    Parser("special_tokens_map", ("checkpoint/special_tokens_map.json",), (EXPORT,), 0.04),
    Parser("chat_template", ("checkpoint/chat_template.jinja",), (EXPORT,), 0.02, form="bytes"),
    Parser("adapter", ("adapter/adapter_config.json",), (_ADAPTED,), 0.03),
    Parser("adapter's weights", ("adapter/adapter_model.safetensors",), (_ADAPTED,), 0.02, "safetensors"),
    Parser("recipe", ("recipe.yaml",), (("export", "{recipe}", *_PLACED),), 0.06),
    Parser(
        "set",
        (),
        (("export", "{recipe}", *_PLACED, "--set", "{value}"),),
        0.06,
        form="bytes",
        words=(
            "quantize.0.bits=8",
            "context_length=32",
            "quantize=[{match: '*', bits: 8}]",
            "validate.mean_kld=0.1",
            "bits_per_weight=5.5",
            "rotate=true",
            "name=x",
        ),
    ),
    Parser("task", ("task.jsonl",), (("export", *EXPORT[1:6], "--dry-run", "--task", "{task}"),), 0.03),
    Parser("calibration text", ("text.jsonl",), (RESUMED,), 0.01),
    Parser("journal", ("out.partial/journal.jsonl",), (RESUMED,), 0.003, form="bytes", on="out.partial"),
    Parser("request", ("out.partial/request.json",), (RESUMED,), 0.002, on="out.partial"),
    Parser("calibration state", ("out.partial/calibration/*",), (RESUMED,), 0.005, form="bytes", on="out.partial"),
    Parser("manifest", ("bundle/manifest.json",), _BUNDLE_COMMANDS, 0.06),
    Parser("genai_config", ("bundle/genai_config.json",), (*_BUNDLE_COMMANDS, GENERATE), 0.05),
    Parser("graph", ("bundle/model.onnx",), (("check", "{bundle}"), ("inspect", "{bundle}"), GENERATE), 0.02, "bytes"),
    Parser("bundle's tokenizer", ("bundle/tokenizer.json", "bundle/tokenizer_config.json"), (GENERATE,), 0.02),
    Parser("reasoning", ("bundle/reasoning.json",), (*_BUNDLE_COMMANDS, GENERATE), 0.01),
    Parser("report", ("out/report.json",), (EXPORT,), 0.015, on="out"),
    Parser("judged", ("bundle/genai_config.json", "bundle/report.json"), (_VALIDATE,), 0.005, on="bundle"),
    Parser("text to compare", ("text.jsonl",), ((*_VALIDATE, "--text", "{text}"),), 0.005, on="bundle"),
    Parser(
        "compiled",
        ("pipeline/manifest.json", "pipeline/genai_config.json", "pipeline/report.json"),
        (("check", "{pipeline}"), ("inspect", "{pipeline}"), _COMPILE),
        0.03,
        on="pipeline",
    ),
    Parser(
        "stages",
        ("pipeline/context.onnx", "pipeline/embeddings.onnx"),
        (("check", "{pipeline}"), ("inspect", "{pipeline}"), _COMPILE),
        0.01,
        form="bytes",
        on="pipeline",
    ),
)
