"""LoRA adapters: every case is merged by torch in float64 beside, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.checkpoint_folders import DOWN, HEAD, TABLE, Tensors, copied, save_tensors, tensors_of
from toolkit.checkpoint.adapter import merge_adapter
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.errors import CheckpointError, ToolkitError, UnsupportedError


@pytest.fixture
def folder(tiny_r1: Path, tmp_path: Path) -> Path:
    return copied(tiny_r1, tmp_path)


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


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"down_proj": 16}}, 4.0),
        ({"alpha_pattern": {"up_proj": 16}}, 2.0),
        ({"alpha_pattern": {r"layers\.1\.mlp\..*": 16}}, 4.0),
        ({"alpha_pattern": {r"^model\.layers\.\d+\.mlp\.down_proj": 16}}, 4.0),
        ({"alpha_pattern": {r"layers\.2\.mlp\..*": 16}}, 2.0),
        ({"rank_pattern": {"down_proj": 4}, "r": 64}, 2.0),
    ],
)
def test_an_adapter_is_merged(folder: Path, config: dict[str, object], scale: float) -> None:
    base = tensors_of(folder)
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
    base = tensors_of(folder)
    rows, width = base[TABLE].shape
    a, b = torch.randn(4, rows), torch.randn(width, 4)
    own_head = torch.randn(base[HEAD].shape)
    tensors = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b, HEAD: own_head}
    merged = merge_adapter(open_checkpoint(folder), _adapter(folder, tensors))
    expected = base[TABLE].double() + 2 * (b.double() @ a.double()).T
    assert np.abs(merged.source.read(TABLE) - expected.numpy()).max() < 1e-4
    assert np.array_equal(merged.source.read(HEAD), own_head.numpy())


@pytest.mark.parametrize(
    ("prefix", "factor", "saved"),
    [
        ("base_model.model.", ".weight", "lm_head.modules_to_save.default.weight"),
        ("base_model.model.base_model.model.", ".default.weight", "lm_head.modules_to_save.weight"),
        ("base_model.model._orig_mod.", ".my_adapter.weight", HEAD),
        ("", "", HEAD),
    ],
)
def test_names_of_other_savers(folder: Path, prefix: str, factor: str, saved: str) -> None:
    base = tensors_of(folder)
    a, b = _factors(base[f"{DOWN}.weight"].shape)
    own_head = torch.randn(base[HEAD].shape)
    named = {f"{DOWN}.lora_A{factor}": a, f"{DOWN}.lora_B{factor}": b, saved: own_head}
    made = _adapter(folder, {}, modules_to_save=["lm_head"])
    save_tensors(made, {prefix + name: value for name, value in named.items()}, "adapter_model.safetensors")
    merged = merge_adapter(open_checkpoint(folder), made)
    expected = base[f"{DOWN}.weight"].double() + 2 * (b.double() @ a.double())
    assert np.abs(merged.source.read(f"{DOWN}.weight") - expected.numpy()).max() < 1e-4
    assert np.array_equal(merged.source.read(HEAD), own_head.numpy())


def test_factors_are_added_to_a_base_that_comes_with_them(folder: Path) -> None:
    """As PEFT saves an embedding whose rows were trained, or a whole state."""
    base = tensors_of(folder)
    a, b = _factors(base[f"{DOWN}.weight"].shape)
    own = torch.randn(base[f"{DOWN}.weight"].shape)
    tensors = {f"{DOWN}.lora_A.weight": a, f"{DOWN}.lora_B.weight": b, f"{DOWN}.base_layer.weight": own}
    merged = merge_adapter(open_checkpoint(folder), _adapter(folder, tensors)).source
    expected = (own.double() + 2 * (b.double() @ a.double())).numpy()
    assert np.abs(merged.read(f"{DOWN}.weight") - expected).max() < 1e-4
    assert np.abs(merged.read_rows(f"{DOWN}.weight", 3, 9) - expected[3:9]).max() < 1e-4


def test_what_stands_in_place_of_an_adapters_weights_is_named(folder: Path) -> None:
    made = _adapter(folder, _zeros())
    (made / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert any("tokenizer.json" in note for note in merge_adapter(open_checkpoint(folder), made).notes)
    (made / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert merge_adapter(open_checkpoint(folder), made).notes == ()
    (made / "adapter_model.safetensors").rename(made / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which is never loaded"):
        merge_adapter(open_checkpoint(folder), made)
    (made / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="the adapter is incomplete"):
        merge_adapter(open_checkpoint(folder), made)


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


def _magnitudes(tensors: Tensors, config: dict[str, object]) -> None:
    tensors[f"{DOWN}.lora_magnitude_vector"] = torch.ones(256)


def _integers(tensors: Tensors, config: dict[str, object]) -> None:
    tensors[f"{DOWN}.lora_A.weight"] = tensors[f"{DOWN}.lora_A.weight"].to(torch.int8)


def _without_rank(tensors: Tensors, config: dict[str, object]) -> None:
    for side in "AB":
        tensors[f"{DOWN}.lora_{side}.weight"] = torch.zeros({"A": (0, 768), "B": (256, 0)}[side])


def _of_another_rank(tensors: Tensors, config: dict[str, object]) -> None:
    config["r"] = 16


def _head_not_saved(tensors: Tensors, config: dict[str, object]) -> None:
    config["modules_to_save"] = ["lm_head"]


def _two_adapters(tensors: Tensors, config: dict[str, object]) -> None:
    tensors[f"{DOWN}.lora_A.second.weight"] = tensors[f"{DOWN}.lora_A.weight"].clone()


def _without_alpha(tensors: Tensors, config: dict[str, object]) -> None:
    config["lora_alpha"] = None


def _endless_pattern(tensors: Tensors, config: dict[str, object]) -> None:
    config["alpha_pattern"] = {r"(\w+\w+)+x": 3}


def _nothing(tensors: Tensors, config: dict[str, object]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_dora, "use_dora is set"),
        (_other_model, "fit no matrix"),
        (_other_shape, r"the factors of .*down_proj.weight are \[3, 4\]"),
        (_half, "fit no matrix"),
        (_prompt_tuning, "peft_type is 'PROMPT_TUNING'"),
        (_magnitudes, "of DoRA"),
        (_integers, "is I8, expected BF16"),
        (_without_rank, "its factors have 0"),
        (_of_another_rank, "the rank of .*down_proj.weight is 16, and its factors have 4"),
        (_head_not_saved, "modules_to_save names 'lm_head', and adapter_model.safetensors has no weights of it"),
        (_two_adapters, "expected one adapter in a file"),
        (_without_alpha, "lora_alpha is None, expected a number"),
        (_endless_pattern, "is not understood"),
        (_nothing, "holds no tensors"),
    ],
)
def test_what_is_no_plain_lora_of_this_model_is_refused(
    folder: Path, change: Callable[[Tensors, dict[str, object]], None], said: str
) -> None:
    a, b = _factors(tensors_of(folder)[f"{DOWN}.weight"].shape)
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
