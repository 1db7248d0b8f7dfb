"""Which weights are meant: never a silent choice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from toolkit.checkpoint.adapter import merge_adapter
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.errors import CheckpointError, ToolkitError, UnsupportedError

HEAD = "lm_head.weight"
TABLE = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tiny_r1: Path, tmp_path: Path) -> Path:
    for path in [*tiny_r1.glob("*.json"), tiny_r1 / "model.safetensors"]:
        shutil.copy(path, tmp_path)
    return tmp_path


def _tensors(folder: Path) -> Tensors:
    return safetensors.torch.load_file(folder / "model.safetensors")


def _save(folder: Path, tensors: Tensors, file: str = "model.safetensors") -> None:
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file)


def _config(folder: Path, **values: object) -> None:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(raw | values), encoding="utf-8")


def _index(folder: Path, tensors: Tensors, file: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}), encoding="utf-8")


def test_a_file_wins_over_a_stale_index_as_in_transformers_and_is_said(folder: Path) -> None:
    tensors = _tensors(folder)
    _save(folder, {name: torch.zeros_like(value) for name, value in tensors.items()}, SHARD)
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
    tensors = _tensors(folder)
    (folder / "model.safetensors").rename(folder / SHARD)
    _index(folder, tensors, SHARD)
    assert open_checkpoint(folder).notes == ()


def test_what_is_not_read_is_named(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert open_checkpoint(folder).notes == ("not read: consolidated.safetensors",)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Mistral's own format"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("file", "said"), [("pytorch_model.bin", "pickles"), ("model.gguf", "GGUF")])
def test_another_format_alone_is_named(folder: Path, file: str, said: str) -> None:
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_a_wrappers_prefix_is_taken_off_and_said(folder: Path, prefix: str) -> None:
    expected = open_checkpoint(folder).source
    head, tensors = expected.read(HEAD), _tensors(folder)
    _save(folder, {prefix + name: value for name, value in tensors.items()})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.source.names() == expected.names()
    assert np.array_equal(checkpoint.source.read(HEAD), head)
    (note,) = checkpoint.notes
    assert all(part in note for part in prefix.replace(".", ". ").split() if part != "model.")
    # The streaming pass too finds the rows by the modules' names.
    assert {rows.name for rows in checkpoint.source.scan(1 << 20)} == set(expected.names())


def test_one_tensor_under_two_names_is_refused(folder: Path) -> None:
    tensors = _tensors(folder)
    _save(folder, tensors | {f"module.{HEAD}": tensors[HEAD].clone()})
    with pytest.raises(CheckpointError, match=r"holds lm_head\.weight twice"):
        open_checkpoint(folder)


def test_a_base_model_without_its_head(folder: Path) -> None:
    """As AutoModel saves it: no `model.`, and no head, which is right where the embedding is tied to it."""
    tensors = {name.removeprefix("model."): value for name, value in _tensors(folder).items() if name != HEAD}
    _save(folder, tensors)
    with pytest.raises(CheckpointError, match=r"has no lm_head.weight, and its config.json does not tie it"):
        open_checkpoint(folder)
    _config(folder, tie_word_embeddings=True)
    assert any("`model.`" in note for note in open_checkpoint(folder).notes)


def test_a_tied_head_that_is_another_is_refused(folder: Path) -> None:
    _config(folder, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight with other weights than the embedding"):
        open_checkpoint(folder)
    tensors = _tensors(folder)
    _save(folder, tensors | {HEAD: tensors[TABLE].clone()})
    assert open_checkpoint(folder).notes == ()


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("model.layers.0.mlp.down_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.down_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", "FP8 with block scales"),
        ("model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
    ],
)
def test_a_quantized_checkpoint_is_named_as_such(folder: Path, name: str, whose: str) -> None:
    _save(folder, _tensors(folder) | {name: torch.zeros(4, dtype=torch.int32)})
    with pytest.raises(UnsupportedError, match=f"is quantized already.*{whose}"):
        open_checkpoint(folder)


def test_mlx_is_known_by_its_scales_and_biases(folder: Path) -> None:
    module = "model.layers.0.mlp.down_proj"
    _save(folder, _tensors(folder) | {f"{module}.scales": torch.zeros(4), f"{module}.biases": torch.zeros(4)})
    with pytest.raises(UnsupportedError, match="by MLX"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": 7}, "already quantized"),
    ],
)
def test_a_config_that_says_so_names_the_method(folder: Path, values: dict[str, object], said: str) -> None:
    _config(folder, **values)
    with pytest.raises(UnsupportedError, match=said) as found:
        open_checkpoint(folder)
    assert "download it again" not in str(found.value)


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


# LoRA: every case is merged by torch in float64 beside.


def _adapter(folder: Path, tensors: Tensors, **config: object) -> Path:
    made = folder / "adapter"
    made.mkdir()
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"} | config
    (made / "adapter_config.json").write_text(json.dumps(whole), encoding="utf-8")
    named = {f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(named, made / "adapter_model.safetensors")
    return made


def _factors(shape: tuple[int, ...], rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"down_proj": 16}}, 4.0),
        ({"alpha_pattern": {"up_proj": 16}}, 2.0),
    ],
)
def test_an_adapter_is_merged(folder: Path, config: dict[str, object], scale: float) -> None:
    base = _tensors(folder)
    a, b = _factors(base[f"{DOWN}.weight"].shape)
    adapter = _adapter(folder, {f"{DOWN}.lora_A.weight": a, f"{DOWN}.lora_B.weight": b}, **config)
    merged = merge_adapter(open_checkpoint(folder), adapter)
    expected = base[f"{DOWN}.weight"].double() + scale * (b.double() @ a.double())
    assert np.abs(merged.source.read(f"{DOWN}.weight") - expected.numpy()).max() < 1e-4
    assert np.abs(merged.source.read_rows(f"{DOWN}.weight", 3, 9) - expected[3:9].numpy()).max() < 1e-4
    assert np.array_equal(merged.source.read(HEAD), base[HEAD].float().numpy())
    for rows in merged.source.scan(1 << 18):
        if rows.name == f"{DOWN}.weight":
            found = merged.source.decode(rows, rows.start, rows.stop)
            assert np.abs(found - expected[rows.start : rows.stop].numpy()).max() < 1e-4
        rows.release()
    files = ["model.safetensors", "adapter_model.safetensors", "adapter_config.json"]
    assert [origin.name for origin in merged.source.digests()] == files
    assert [origin.name for origin in merged.source.identity()] == files


def test_an_adapters_embedding_and_whole_modules(folder: Path) -> None:
    base = _tensors(folder)
    rows, width = base[TABLE].shape
    a, b = torch.randn(4, rows), torch.randn(width, 4)
    own_head = torch.randn(base[HEAD].shape)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b, HEAD: own_head}
    merged = merge_adapter(open_checkpoint(folder), _adapter(folder, tensors))
    expected = base[TABLE].double() + 2 * (b.double() @ a.double()).T
    assert np.abs(merged.source.read(TABLE) - expected.numpy()).max() < 1e-4
    assert np.array_equal(merged.source.read(HEAD), own_head.numpy())


def _dora(tensors: Tensors, config: dict[str, object]) -> None:
    config["use_dora"] = True


def _other_model(tensors: Tensors, config: dict[str, object]) -> None:
    tensors["model.layers.99.mlp.down_proj.lora_A.weight"] = torch.zeros(4, 4)


def _other_shape(tensors: Tensors, config: dict[str, object]) -> None:
    tensors[f"{DOWN}.lora_B.weight"] = torch.zeros(3, 4)


def _half(tensors: Tensors, config: dict[str, object]) -> None:
    del tensors[f"{DOWN}.lora_B.weight"]


def _prompt_tuning(tensors: Tensors, config: dict[str, object]) -> None:
    config["peft_type"] = "PROMPT_TUNING"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_dora, "use_dora is set"),
        (_other_model, "fit no matrix"),
        (_other_shape, r"the factors of .*down_proj.weight are \[3, 4\]"),
        (_half, "fit no matrix"),
        (_prompt_tuning, "peft_type is 'PROMPT_TUNING'"),
    ],
)
def test_what_is_no_plain_lora_of_this_model_is_refused(
    folder: Path, change: Callable[[Tensors, dict[str, object]], None], said: str
) -> None:
    a, b = _factors(_tensors(folder)[f"{DOWN}.weight"].shape)
    tensors: Tensors = {f"{DOWN}.lora_A.weight": a, f"{DOWN}.lora_B.weight": b}
    config: dict[str, object] = {}
    change(tensors, config)
    with pytest.raises(ToolkitError, match=said):
        merge_adapter(open_checkpoint(folder), _adapter(folder, tensors, **config))


def test_an_adapter_in_the_checkpoints_folder_is_a_question(folder: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds a LoRA adapter beside its base"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter for owner/base, no model.*--adapter"):
        open_checkpoint(folder)


@pytest.mark.parametrize("before", ["./", ".//./"])
def test_an_index_may_say_that_shards_are_here(folder: Path, before: str) -> None:
    tensors = _tensors(folder)
    (folder / "model.safetensors").rename(folder / SHARD)
    _index(folder, tensors, before + SHARD)
    checkpoint = open_checkpoint(folder)
    assert [origin.name for origin in checkpoint.source.identity()] == [SHARD] and checkpoint.notes == ()


@pytest.mark.parametrize("before", ["../", "sub/", "/etc/", ".\\", "./../"])
def test_an_index_may_not_lead_elsewhere(folder: Path, before: str) -> None:
    _index(folder, _tensors(folder), before + SHARD)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a shard must be a plain file name there"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("old", "new"), [("^", "_fsdp_wrapped_module."), ("self_attn.", "_checkpoint_wrapped_module.self_attn.")]
)
def test_wrappers_of_training_are_taken_off_and_said(folder: Path, old: str, new: str) -> None:
    tensors = _tensors(folder)
    _save(folder, {new + n if old == "^" else n.replace(old, new): value for n, value in tensors.items()})
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
    _save(folder, {prefix + name: value for name, value in _tensors(folder).items()})
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(folder)
    assert "download" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base model's own weights"),
        ({"init_lora_weights": "OLoRA"}, "changed the base model's own weights"),
        ({"init_lora_weights": "loftq"}, "changed the base model's own weights"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    ],
)
def test_an_adapter_over_changed_weights_is_refused(folder: Path, config: dict[str, object], said: str) -> None:
    made = _adapter(folder, _zeros(), **config)
    with pytest.raises(UnsupportedError, match=said):
        merge_adapter(open_checkpoint(folder), made)


@pytest.mark.parametrize("begins", [True, False, "gaussian", "eva", "orthogonal", None])
def test_how_an_adapters_own_factors_begin_does_not_matter(folder: Path, begins: object) -> None:
    merge_adapter(open_checkpoint(folder), _adapter(folder, _zeros(), init_lora_weights=begins))


def _zeros() -> Tensors:
    return {f"{DOWN}.lora_A.weight": torch.zeros(4, 768), f"{DOWN}.lora_B.weight": torch.zeros(256, 4)}
