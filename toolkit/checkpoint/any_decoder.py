"""A checkpoint of a family that has no file in `families/`: what its config.json says of any decoder, and its tensors
by the names that whoever traced it found.

What its layers are made of is transformers' to know, so nothing here says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from toolkit import names
from toolkit.checkpoint.config import MOST_LAYERS, ModelConfig, check_kind, read_checkpoint_json
from toolkit.checkpoint.families import FAMILIES
from toolkit.checkpoint.family import Structure
from toolkit.checkpoint.fields import Fields
from toolkit.checkpoint.opened import Checkpoint, side_notes
from toolkit.checkpoint.other_formats import missing_config, refuse_integers, refuse_quantized
from toolkit.checkpoint.quantized_config import read_quantization
from toolkit.checkpoint.rope_config import RopeConfig
from toolkit.checkpoint.safetensors import ITEM_BYTES, TensorRef, read_header
from toolkit.checkpoint.side_files import read_side_files
from toolkit.checkpoint.weights import FileWeights, all_tensors
from toolkit.checkpoint.which_tensors import choose_files, refuse_adapter
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.files import is_there

# What families of earlier years call a key.
_OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("ffn_hidden_size", "n_inner", "ffn_dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_sequence_length", "seq_length"),
}
_DEFAULT_POSITIONS: Final = 2048
_MAX_CONFIG_BYTES: Final = 4 << 20


def open_any_decoder(folder: Path) -> Checkpoint:
    """A checkpoint of any family, as far as it is read before it is traced: no tensor is called for yet.

    Raises CheckpointError for a folder that is none, UnsupportedError for a family that has a form of its own, an
    encoder with a decoder, or weights that are quantized.
    """
    refuse_adapter(folder)
    path = folder / names.CONFIG_FILE
    if folder.is_dir() and not is_there(path, CheckpointError):
        raise missing_config(folder)
    config = _config(read_checkpoint_json(path, _MAX_CONFIG_BYTES), path)
    if by := read_quantization(folder):
        raise UnsupportedError(f"{folder} is quantized ({by.words}): --trace reads plain floats, name the original")
    chosen = choose_files(folder)
    refs, placed = all_tensors(chosen, read_header)
    refuse_quantized(refs, folder)
    side = read_side_files(folder, config.vocab_size)
    notes = (*chosen.notes, *placed, *side_notes(side, config.vocab_size))
    return Checkpoint(folder, config, FileWeights(refs, list(chosen.files)), False, side, notes)


def _config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path}: model_type is {model_type!r:.60}, expected the name of a family")
    if model_type in FAMILIES:
        raise UnsupportedError(f"{path}: {model_type} has a fused form, which is faster: leave --trace out")
    if raw.get("is_encoder_decoder") is True:
        raise UnsupportedError(
            f"{path}: {model_type} is an encoder with a decoder, which --trace does not convert: expected "
            "a decoder of text"
        )
    if raw.get("auto_map"):
        raise UnsupportedError(
            f"{path}: auto_map names Python code of the checkpoint's own, which is never run: expected a family of "
            "transformers"
        )
    check_kind(raw, path)
    read = Fields(raw, path, _by_first_names(raw))
    heads, hidden, vocab = (read.count(key) for key in ("num_attention_heads", "hidden_size", "vocab_size"))
    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=read.count("intermediate_size", 4 * hidden),
        num_hidden_layers=read.count("num_hidden_layers", most=MOST_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=read.count("num_key_value_heads", heads),
        head_dim=read.count("head_dim", max(hidden // heads, 1)),
        rotary_head_dim=read.count("head_dim", max(hidden // heads, 1)),
        attention_scale=1.0,
        vocab_size=vocab,
        max_position_embeddings=read.count("max_position_embeddings", _DEFAULT_POSITIONS),
        rms_norm_eps=1.0,
        # transformers leaves the key out of a config.json of a tied model.
        tie_word_embeddings=read.flag("tie_word_embeddings", default=True),
        structure=Structure(),
        rope=RopeConfig(),
        bos_token_id=read.token_id("bos_token_id", vocab),
        eos_token_ids=read.token_ids("eos_token_id"),
        pad_token_id=read.token_id("pad_token_id", vocab),
        traced=True,
    )


def _by_first_names(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys that a config.json has under another name, under the name that most families have."""
    return {
        key: raw[other]
        for key, others in _OTHER_NAMES.items()
        for other in reversed(others)
        if raw.get(key) is None and raw.get(other) is not None
    }


def with_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, tuple[str, ...]]
) -> tuple[Checkpoint, Mapping[str, str]]:
    """The checkpoint with the tensors of these shapes alone, and what it calls each, by the module's name or an alias.

    Raises CheckpointError for one that is missing or of another shape, UnsupportedError for one that is no float.
    """
    chosen = choose_files(checkpoint.folder)
    stored, _ = all_tensors(chosen, read_header)
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        own = next((one for one in (name, *aliases[name]) if one in stored), None)
        if own is None:
            raise CheckpointError(f"{checkpoint.folder} has no {name}, which transformers' {_of(checkpoint)} reads")
        if stored[own].shape != shape:
            raise CheckpointError(
                f"{own} has shape {list(stored[own].shape)}, expected {list(shape)} by {names.CONFIG_FILE}"
            )
        found[name] = own
    refs: dict[str, TensorRef] = {own: stored[own] for own in found.values()}
    refuse_integers(refs.values(), ITEM_BYTES, checkpoint.folder)
    return replace(checkpoint, source=FileWeights(refs, list(chosen.files))), found


def _of(checkpoint: Checkpoint) -> str:
    return checkpoint.config.model_type
