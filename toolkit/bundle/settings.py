"""A bundle's genai_config.json as it is read, in one place: typed as it stands, and whole for those who run a bundle.

`GenaiConfig` has what the linter holds against the graphs, None where a key is absent. `Settings` is what running
needs, checked to be there and to make sense; changed settings come from its methods, and keep every key they do not
change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.checkpoint.config import MOST_LAYERS
from toolkit.errors import BundleError
from toolkit.files import json_text, read_json
from toolkit.typed_json import JsonObject, from_json

_MAX_BYTES: Final = 16 << 20
# onnxruntime-genai keeps counts and ids in 32 bits.
_MOST: Final = (1 << 31) - 1
_SOC: Final = ("soc_model", "htp_arch", "enable_block_quant_weight_optimization")
# A provider's options as they are to be, from its name in onnxruntime-genai and its options as they are.
ProviderChange = Callable[[str, Mapping[str, str]], Mapping[str, str]]


@dataclass(frozen=True)
class SessionOptions:
    """How the session of a graph is opened; each entry of `provider_options` maps a provider's name to its options."""

    provider_options: tuple[dict[str, dict[str, str]], ...] = ()
    intra_op_num_threads: int = 0


@dataclass(frozen=True)
class PipelineStage:
    """One stage of `model.decoder.pipeline`, with the defaults that onnxruntime-genai has for what is absent."""

    filename: str | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    run_on_prompt: bool = True
    run_on_token_gen: bool = True
    is_lm_head: bool = False
    output_names_forwarder: dict[str, str] = field(default_factory=dict)
    session_options: SessionOptions = SessionOptions()


@dataclass(frozen=True)
class SlidingWindow:
    """`model.decoder.sliding_window`: how a pipeline's prompt is cut, with onnxruntime-genai's own defaults."""

    window_size: int | None = None
    alignment: str = "right"
    slide_key_value_cache: bool = True
    slide_inputs: bool = True


@dataclass(frozen=True)
class DecoderSettings:
    """`model.decoder`: one graph, or the stages of a pipeline; what is absent is None or empty."""

    filename: str | None = None
    head_size: int | None = None
    num_key_value_heads: int | None = None
    num_hidden_layers: int = 0
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    session_options: SessionOptions = SessionOptions()
    sliding_window: SlidingWindow = SlidingWindow()
    pipeline: tuple[dict[str, PipelineStage], ...] = ()

    def stages(self) -> dict[str, PipelineStage]:
        """The stages of a pipeline by name, in their order; none of a single graph."""
        return {name: stage for group in self.pipeline for name, stage in group.items()}


@dataclass(frozen=True)
class ModelSettings:
    """`model`: sizes and special ids, None where absent; `eos_token_id` is always the list of them."""

    type: str | None = None
    vocab_size: int | None = None
    context_length: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    decoder: DecoderSettings = DecoderSettings()


@dataclass(frozen=True)
class SearchSettings:
    """What of `search` has to fit the graphs; how text is sampled is onnxruntime-genai's to read."""

    max_length: int | None = None
    chunk_size: int | None = None
    past_present_share_buffer: bool = False


@dataclass(frozen=True)
class GenaiConfig:
    """What genai_config.json says, key by key, as far as it is read here."""

    model: ModelSettings
    search: SearchSettings


@dataclass(frozen=True)
class StageSettings:
    """One graph of a bundle: its stage, its file in the bundle, and how its session is opened."""

    name: str
    filename: str
    session_options: SessionOptions

    @property
    def providers(self) -> tuple[str, ...]:
        """Returns onnxruntime-genai's names of the execution providers it asks for besides the CPU."""
        return tuple(name for entry in self.session_options.provider_options for name in entry)


@dataclass(frozen=True)
class Settings:
    """What running a bundle needs of its settings, lengths in tokens.

    `window` is how many tokens of a prompt a pipeline takes at once, 1 for a single graph. `stages` are a pipeline's in
    their order, or the one graph under the name `model`. An MTP head takes another model's hidden states, and writes
    nothing by itself.
    """

    context_length: int
    max_length: int
    vocab_size: int
    pad_token_id: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    window: int
    is_pipeline: bool
    stages: tuple[StageSettings, ...]
    # The file's own text, so that changed settings keep what is not read here.
    text: str = field(repr=False)
    is_mtp_head: bool = False

    def length_for(self, prompt_tokens: int, new_tokens: int) -> int:
        """Returns the max_length that leaves room for so many new tokens: a pipeline's prompt takes up whole windows,
        pads included. Never more than the context."""
        padded = -(-prompt_tokens // self.window) * self.window
        return min(padded + new_tokens, self.context_length)

    def room_after(self, prompt_tokens: int, new_tokens: int) -> int:
        """Returns how many of so many new tokens the context leaves to a prompt."""
        return self.length_for(prompt_tokens, new_tokens) - self.length_for(prompt_tokens, 0)

    def providers(self) -> list[str]:
        """Returns onnxruntime-genai's names of the execution providers the bundle asks for besides the CPU."""
        return sorted({name for stage in self.stages for name in stage.providers})

    def soc_options(self) -> dict[str, str]:
        """Returns what the settings tell QNNExecutionProvider of the SoC the bundle is made for, and of its weights."""
        entries = [entry for stage in self.stages for entry in stage.session_options.provider_options]
        given = [option for entry in entries for options in entry.values() for option in options.items()]
        return {key: value for key, value in given if key in _SOC}

    def for_soc(self, options: Mapping[str, str]) -> Settings:
        """Returns the settings for another SoC, which `options` describe; only options already there change."""
        return self.with_provider_options(
            lambda _, given: {**given, **{key: value for key, value in options.items() if key in given}}
        )

    def with_files(self, files: Mapping[str, str]) -> Settings:
        """Returns the settings with the stages named in `files` run from those files."""
        return self._changed(lambda name, section: section.update({"filename": files.get(name, section["filename"])}))

    def on_cpu(self, session: Mapping[str, str] | None = None) -> Settings:
        """Returns the settings with no provider asked for, so that every stage runs on the CPU, and the options of
        `session` added to every stage's."""
        return self.with_session_options({**(session or {}), "provider_options": []})

    def with_session_options(self, options: Mapping[str, object]) -> Settings:
        """Returns the settings with `options` among those of every stage's session."""
        return self._changed(lambda _, section: section.setdefault("session_options", {}).update(options))

    def with_threads(self, count: int) -> Settings:
        """Returns the settings with so many threads for each stage, 0 for one a core."""
        told = {"intra_op_num_threads": count}
        return self._changed(lambda _, section: section.setdefault("session_options", {}).update(told))

    def with_provider_options(self, wanted: ProviderChange, session: Mapping[str, str] | None = None) -> Settings:
        """Returns the settings with each provider's options as `wanted` makes them, and the options of `session` added
        to the stages that ask for a provider."""

        def change(_: str, section: JsonObject) -> None:
            options = section.get("session_options", {})
            entries = [entry for entry in options.get("provider_options", []) if entry]
            for entry in entries:
                entry |= {name: dict(wanted(name, given)) for name, given in entry.items()}
            if entries:
                options |= session or {}

        return self._changed(change)

    def _changed(self, change: Callable[[str, JsonObject], None]) -> Settings:
        """The settings after `change` has seen each stage's name and its object in the file."""
        raw: JsonObject = json.loads(self.text)
        decoder = raw["model"]["decoder"]
        stages = [stage for group in decoder.get("pipeline", []) for stage in group.items()]
        for name, section in stages or [(names.MODEL, decoder)]:
            change(name, section)
        return _whole(config_of(raw), json_text(raw))


def read_genai_config(bundle: Path) -> JsonObject:
    """Returns the object in a bundle's file; raises BundleError if it is missing or is not a JSON object."""
    path = bundle / names.GENAI_CONFIG_FILE
    return read_json(path, _MAX_BYTES, BundleError, "a bundle has one")


def config_of(raw: JsonObject) -> GenaiConfig:
    """Returns what genai_config.json's object says, typed. Raises ValueError in one line for a value of a type that no
    version of onnxruntime-genai would read for its key."""
    model = raw.get("model", {})
    if isinstance(model, dict) and _is_id(model.get("eos_token_id")):
        model = {**model, "eos_token_id": [model["eos_token_id"]]}
    config = GenaiConfig(
        from_json(ModelSettings, model, "model"), from_json(SearchSettings, raw.get("search", {}), "search")
    )
    if not 0 <= config.model.decoder.num_hidden_layers <= MOST_LAYERS:
        found = str(config.model.decoder.num_hidden_layers)[:20]
        raise ValueError(f"model.decoder.num_hidden_layers is {found}, expected 0 to {MOST_LAYERS}")
    return config


def read_settings(bundle: Path) -> Settings:
    """Reads what running a bundle needs; raises BundleError if the file is missing, or anything of it is missing or
    makes no sense."""
    raw = read_genai_config(bundle)
    try:
        text = json_text(raw)
        text.encode("utf-8")
        return _whole(config_of(raw), text)
    except (ValueError, OverflowError, RecursionError) as problem:
        path = bundle / names.GENAI_CONFIG_FILE
        reason = str(problem).splitlines()[0][:200]
        raise BundleError(f"{path} is not whole: {reason}: see `toolkit check {bundle}`") from None


def _whole(config: GenaiConfig, text: str) -> Settings:
    """What running needs, out of a file of this text. Raises ValueError in one line for what is missing."""
    model, decoder, stages = config.model, config.model.decoder, config.model.decoder.stages()
    if not model.eos_token_id:
        raise ValueError("model.eos_token_id is missing, expected an id that ends an answer, or a list of them")
    window = decoder.sliding_window.window_size
    opened = [(name, stage.filename, stage.session_options) for name, stage in stages.items()]
    return Settings(
        context_length=_count("model.context_length", model.context_length, 1),
        max_length=_count("search.max_length", config.search.max_length, 1),
        vocab_size=_count("model.vocab_size", model.vocab_size, 1),
        pad_token_id=_count("model.pad_token_id", model.pad_token_id, 0),
        bos_token_id=None if model.bos_token_id is None else _count("model.bos_token_id", model.bos_token_id, 0),
        eos_token_ids=tuple(_count("model.eos_token_id", one, 0) for one in model.eos_token_id),
        window=_count("model.decoder.sliding_window.window_size", 1 if window is None and not stages else window, 1),
        is_pipeline=bool(stages),
        stages=tuple(
            StageSettings(_plain(f"stage {name}", name), _plain(f"the filename of stage {name}", file), options)
            for name, file, options in opened or [(names.MODEL, decoder.filename, decoder.session_options)]
        ),
        text=text,
        is_mtp_head=names.HIDDEN_STATES in decoder.inputs,
    )


def _count(key: str, value: int | None, least: int) -> int:
    if value is None:
        raise ValueError(f"{key} is missing, expected at least {least}")
    if not least <= value <= _MOST:
        raise ValueError(f"{key} is {str(value)[:20]}, expected {least} to {_MOST}")
    return value


def _plain(what: str, value: str | None) -> str:
    """A name that cannot lead out of the bundle's folder."""
    if not value or Path(value).name != value or "\\" in value or "\0" in value:
        raise ValueError(f"{what[:60]} is {value!r:.60}, expected the name of a file in the bundle")
    return value


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
