"""Which weights are meant: never a silent choice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoint_folders import DOWN, HEAD, TABLE, Tensors, copied, save_tensors, set_keys, tensors_of
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.errors import CheckpointError, UnsupportedError

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tiny_r1: Path, tmp_path: Path) -> Path:
    return copied(tiny_r1, tmp_path)


def _config(folder: Path, **values: object) -> None:
    set_keys(folder / "config.json", **values)


def _index(folder: Path, tensors: Tensors, file: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}), encoding="utf-8")


def test_a_file_wins_over_a_stale_index_as_in_transformers_and_is_said(folder: Path) -> None:
    tensors = tensors_of(folder)
    save_tensors(folder, {name: torch.zeros_like(value) for name, value in tensors.items()}, SHARD)
    _index(folder, tensors, SHARD)
    checkpoint = open_checkpoint(folder)
    assert np.array_equal(checkpoint.source.read(HEAD), tensors[HEAD].float().numpy())
    assert [origin.name for origin in checkpoint.source.identity()] == ["model.safetensors"]
    assert any(INDEX in note and "is not read" in note for note in checkpoint.notes)
    assert any(SHARD in note for note in checkpoint.notes)
    # save_pretrained into the same folder leaves the index and takes the shards.
    (folder / SHARD).unlink()
    assert any("is not read" in note for note in open_checkpoint(folder).notes)
    # Without the file the index is meant, and incomplete.
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARD} is missing"):
        open_checkpoint(folder)


def test_an_index_over_shards_is_no_choice_and_says_nothing(folder: Path) -> None:
    tensors = tensors_of(folder)
    (folder / "model.safetensors").rename(folder / SHARD)
    _index(folder, tensors, SHARD)
    assert open_checkpoint(folder).notes == ()


def test_what_is_not_read_is_named(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert open_checkpoint(folder).notes == ("not read: consolidated.safetensors",)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Mistral's own format"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model.bin", "pickles"),
        ("model.gguf", "GGUF"),
        ("flax_model.msgpack", "for Flax alone"),
        ("tf_model.h5", "for TensorFlow alone"),
        ("model.onnx", "ONNX graphs"),
        ("__0_0.distcp", "shards of a training run"),
        ("model.safetensors.incomplete", "a download that is not finished"),
        ("model.fp16.safetensors", r"rename it to model\.safetensors"),
    ],
)
def test_another_format_alone_is_named(folder: Path, file: str, said: str) -> None:
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_a_wrappers_prefix_is_taken_off_and_said(folder: Path, prefix: str) -> None:
    expected = open_checkpoint(folder).source
    head, tensors = expected.read(HEAD), tensors_of(folder)
    save_tensors(folder, {prefix + name: value for name, value in tensors.items()})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.source.names() == expected.names()
    assert np.array_equal(checkpoint.source.read(HEAD), head)
    (note,) = checkpoint.notes
    assert all(part in note for part in prefix.replace(".", ". ").split() if part != "model.")
    # The streaming pass too finds the rows by the modules' names.
    assert {rows.name for rows in checkpoint.source.scan(1 << 20)} == set(expected.names())


def test_one_tensor_under_two_names_is_refused(folder: Path) -> None:
    tensors = tensors_of(folder)
    save_tensors(folder, tensors | {f"module.{HEAD}": tensors[HEAD].clone()})
    with pytest.raises(CheckpointError, match=r"holds lm_head\.weight twice"):
        open_checkpoint(folder)


def test_a_base_model_without_its_head(folder: Path) -> None:
    """As AutoModel saves it: no `model.`, and no head, which is right where the embedding is tied to it."""
    tensors = {name.removeprefix("model."): value for name, value in tensors_of(folder).items() if name != HEAD}
    save_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=r"has no lm_head.weight, and its config.json does not tie it"):
        open_checkpoint(folder)
    _config(folder, tie_word_embeddings=True)
    assert any("`model.`" in note for note in open_checkpoint(folder).notes)


def test_a_tied_head_that_is_another_is_refused(folder: Path) -> None:
    _config(folder, tie_word_embeddings=True)
    refusal = r"lm_head.weight with other weights than the embedding"
    with pytest.raises(CheckpointError, match=refusal):
        open_checkpoint(folder)
    tensors = tensors_of(folder)
    for row in (5, 1023):  # whichever it is
        head = tensors[TABLE].clone()
        head[row, 7] += 1
        save_tensors(folder, tensors | {HEAD: head})
        with pytest.raises(CheckpointError, match=refusal):
            open_checkpoint(folder)
    save_tensors(folder, tensors | {HEAD: tensors[TABLE].float()})  # the same numbers in another dtype
    assert open_checkpoint(folder).notes == ()
    save_tensors(folder, tensors | {HEAD: tensors[TABLE].clone()})
    assert open_checkpoint(folder).notes == ()


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("model.layers.0.mlp.down_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.down_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", "FP8 with block scales"),
        ("model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.0.mlp.down_proj.W_q", "HQQ"),
        ("model.layers.0.mlp.down_proj.codes", "AQLM"),
        ("model.layers.0.mlp.down_proj.weight_scale_2", "ModelOpt"),
        ("model.layers.0.mlp.down_proj.weight._data", "quanto"),
    ],
)
def test_a_quantized_checkpoint_is_named_as_such(folder: Path, name: str, whose: str) -> None:
    save_tensors(folder, tensors_of(folder) | {name: torch.zeros(4, dtype=torch.int32)})
    with pytest.raises(UnsupportedError, match=f"is quantized already.*{whose}"):
        open_checkpoint(folder)


def test_mlx_is_known_by_its_scales_and_biases(folder: Path) -> None:
    module = "model.layers.0.mlp.down_proj"
    save_tensors(folder, tensors_of(folder) | {f"{module}.scales": torch.zeros(4), f"{module}.biases": torch.zeros(4)})
    with pytest.raises(UnsupportedError, match="by MLX"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "bitblas"}}, "gptq"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "e5m2"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": 7}, "already quantized"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes.*take quantization_config out"),
        ({"quantization_config": {"producer": {"name": "modelopt"}}}, "modelopt"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_a_config_that_says_so_names_the_method(folder: Path, values: dict[str, object], said: str) -> None:
    _config(folder, **values)
    with pytest.raises(UnsupportedError, match=said) as found:
        open_checkpoint(folder)
    assert "download it again" not in str(found.value)


def test_a_config_that_says_so_of_plain_floats_is_not_believed_and_said(folder: Path) -> None:
    _config(folder, quantization_config={"quant_method": "fp8"})
    assert "config.json says fp8, and all weights are plain floats" in open_checkpoint(folder).notes


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32, torch.float8_e5m2])
def test_numbers_that_only_a_quantizer_stores_are_named(folder: Path, dtype: torch.dtype) -> None:
    """As some save them, without a word in config.json."""
    tensors = tensors_of(folder)
    save_tensors(folder, tensors | {f"{DOWN}.weight": tensors[f"{DOWN}.weight"].to(dtype)})
    said = r"down_proj.weight is .*name the original"
    with pytest.raises((CheckpointError, UnsupportedError), match=said):
        open_checkpoint(folder)


def test_float64_is_read_as_float32(folder: Path) -> None:
    tensors = {name: value.double() * (1 + 1e-9) for name, value in tensors_of(folder).items()}
    save_tensors(folder, tensors)
    source = open_checkpoint(folder).source
    assert np.array_equal(source.read(HEAD), tensors[HEAD].float().numpy())
    for rows in source.scan(1 << 18):
        if rows.name == HEAD:
            found = source.decode(rows, rows.start, rows.stop)
            assert np.array_equal(found, tensors[HEAD][rows.start : rows.stop].float().numpy())
        rows.release()
    save_tensors(folder, tensors | {HEAD: tensors[HEAD] + 1e300})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        open_checkpoint(folder).source.read(HEAD)


def _halves(folder: Path) -> tuple[list[str], list[str]]:
    """Two shards without an index; returns the names of the tensors in each."""
    tensors = tensors_of(folder)
    names = sorted(tensors)
    parts = names[:10], names[10:]
    for number, part in enumerate(parts, 1):
        save_tensors(folder, {name: tensors[name] for name in part}, f"model-{number:05}-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    return parts


def test_shards_whose_index_is_gone_are_read_and_said(folder: Path) -> None:
    head = tensors_of(folder)[HEAD].float().numpy()
    _halves(folder)
    checkpoint = open_checkpoint(folder)
    assert np.array_equal(checkpoint.source.read(HEAD), head)
    assert any(f"no {INDEX}" in note for note in checkpoint.notes)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors is missing"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_that_of_the_one_that_the_index_names(folder: Path) -> None:
    tensors = tensors_of(folder)
    first, second = _halves(folder)
    name, stale = first[0], "model-00002-of-00002.safetensors"
    save_tensors(folder, {name: torch.zeros_like(tensors[name])} | {other: tensors[other] for other in second}, stale)
    with pytest.raises(CheckpointError, match=f"{name} stands in"):
        open_checkpoint(folder)
    where = dict.fromkeys(second, stale) | dict.fromkeys(first, "model-00001-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    checkpoint = open_checkpoint(folder)
    assert np.array_equal(checkpoint.source.read(name), tensors[name].float().numpy())
    assert any(name in note and "the index names" in note for note in checkpoint.notes)


def test_a_tied_table_under_its_heads_name_alone(folder: Path) -> None:
    tensors = tensors_of(folder)
    save_tensors(folder, {name: value for name, value in tensors.items() if name != TABLE})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors, the first is {TABLE}"):
        open_checkpoint(folder)
    _config(folder, tie_word_embeddings=True)
    checkpoint = open_checkpoint(folder)
    assert np.array_equal(checkpoint.source.read(TABLE), tensors[HEAD].float().numpy())
    assert checkpoint.notes == ("lm_head.weight is read as the embedding, which it is tied to",)


@pytest.mark.parametrize("name", ["v_head.summary.weight", "mtp.fc.weight", f"{DOWN}.k_scale", "vision_tower.x"])
def test_what_stands_beside_the_decoder_is_left_and_said(folder: Path, name: str) -> None:
    save_tensors(folder, tensors_of(folder) | {name: torch.zeros(4)})
    (note,) = open_checkpoint(folder).notes
    assert "beside the decoder" in note and name in note


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.4.mlp.down_proj.weight", "num_hidden_layers is 4 in its config.json, and there are more"),
        ("model.layers.0.self_attn.o_proj.bias", "lacks attention_bias"),
        ("lm_head.bias", "lacks attention_bias"),
        ("model.layers.0.self_attn.q_norm.weight", "its config.json is another model's"),
    ],
)
def test_what_the_decoder_would_compute_with_is_refused(folder: Path, name: str, said: str) -> None:
    save_tensors(folder, tensors_of(folder) | {name: torch.zeros(4)})
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize("vocab_size", [1000, 1100])
def test_another_vocabulary_than_the_configs_says_what_to_set(folder: Path, vocab_size: int) -> None:
    _config(folder, vocab_size=vocab_size)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has 1024 rows.*set vocab_size to 1024"):
        open_checkpoint(folder)


def test_a_link_to_nothing_is_named(folder: Path) -> None:
    """As a cache leaves them whose files were removed."""
    for file in ("model.safetensors", "tokenizer_config.json", "generation_config.json", "config.json"):
        kept = (folder / file).read_bytes()
        (folder / file).unlink()
        try:
            (folder / file).symlink_to("../blobs/gone")
        except OSError:
            pytest.skip("no links here")
        with pytest.raises(CheckpointError, match=rf"{file} is a link to a file that is gone"):
            open_checkpoint(folder)
        (folder / file).unlink()
        (folder / file).write_bytes(kept)


@pytest.mark.parametrize("text", ["<!DOCTYPE html><html>", '{"error":"Repository not found"}', "# xet version 0\n"])
def test_a_page_in_place_of_weights_is_called_one(folder: Path, text: str) -> None:
    (folder / "model.safetensors").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="no safetensors file but a text that begins with"):
        open_checkpoint(folder)


def test_a_folder_of_checkpoints_names_one(folder: Path) -> None:
    (folder / "checkpoint-500").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(folder / "checkpoint-500" / path.name)
    with pytest.raises(CheckpointError, match=r"config.json is missing.*checkpoint-500 does: name that folder"):
        open_checkpoint(folder)


def test_rows_beyond_a_tensor_are_an_error(folder: Path) -> None:
    source = open_checkpoint(folder).source
    rows = source.read(TABLE).shape[0]
    assert source.read_rows(TABLE, rows - 1, rows).shape[0] == 1
    for start, stop in ((rows, rows + 1), (0, rows + 1), (-1, 1), (2, 1)):
        with pytest.raises(CheckpointError, match=rf"has {rows} rows"):
            source.read_rows(TABLE, start, stop)


def test_ids_beyond_the_embedding_are_warned_of(folder: Path) -> None:
    assert open_checkpoint(folder).notes == ()
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["added_tokens"].append({"id": 1024, "content": "<tool_call>", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    (note,) = open_checkpoint(folder).notes
    assert "1 ids beyond the embedding's 1024 rows" in note and "<tool_call>" in note


@pytest.mark.parametrize("before", ["./", ".//./"])
def test_an_index_may_say_that_shards_are_here(folder: Path, before: str) -> None:
    tensors = tensors_of(folder)
    (folder / "model.safetensors").rename(folder / SHARD)
    _index(folder, tensors, before + SHARD)
    checkpoint = open_checkpoint(folder)
    assert [origin.name for origin in checkpoint.source.identity()] == [SHARD] and checkpoint.notes == ()


@pytest.mark.parametrize("before", ["../", "sub/", "/etc/", ".\\", "./../"])
def test_an_index_may_not_lead_elsewhere(folder: Path, before: str) -> None:
    _index(folder, tensors_of(folder), before + SHARD)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a shard must be a plain file name there"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("old", "new"), [("^", "_fsdp_wrapped_module."), ("self_attn.", "_checkpoint_wrapped_module.self_attn.")]
)
def test_wrappers_of_training_are_taken_off_and_said(folder: Path, old: str, new: str) -> None:
    tensors = tensors_of(folder)
    save_tensors(folder, {new + n if old == "^" else n.replace(old, new): value for n, value in tensors.items()})
    checkpoint = open_checkpoint(folder)
    assert np.array_equal(checkpoint.source.read(HEAD), tensors[HEAD].float().numpy())
    assert any("_wrapped_module." in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("model.", "as a part of another model"),
        ("language_model.", "as a part of another model"),
        ("transformer.", "names its tensors otherwise than its config.json calls for, transformer.lm_head.weight"),
    ],
)
def test_other_names_are_not_downloaded_again(folder: Path, prefix: str, said: str) -> None:
    save_tensors(folder, {prefix + name: value for name, value in tensors_of(folder).items()})
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(folder)
    assert "download" not in str(caught.value)
