"""Folders whose matrices are quantized by torch as each method stores them, and what torch dequantizes them to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]
# What a matrix becomes: the tensors that stand for it, by what follows its module's name, and its floats.
Quantizer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
FP8: Final = torch.float8_e4m3fn
BLOCKS: Final = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def spread(scales: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """One scale a weight, from one a block; the last blocks are cut."""
    wide = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


def fp8_blocks(block: tuple[int, int], dtype: torch.dtype = torch.float32, name: str = "weight_scale_inv") -> Quantizer:
    """E4M3 with a scale for each block, or each channel where a block is a row, in any dtype of scales."""

    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = weight.shape
        high, wide = min(block[0], rows), min(block[1], columns)
        grid = -(-rows // high), -(-columns // wide)
        padded = torch.zeros(grid[0] * high, grid[1] * wide)
        padded[:rows, :columns] = weight
        largest = padded.reshape(grid[0], high, grid[1], wide).abs().amax((1, 3)).clamp(min=1e-6)
        scales = (largest / 448).to(dtype)
        if dtype == torch.float8_e8m0fnu:
            scales = torch.exp2(torch.ceil(torch.log2(largest / 448))).to(dtype)
        each = spread(scales, weight.shape, (high, wide))
        codes = (weight / each).clamp(-448, 448).to(FP8)
        return {"weight": codes, name: scales}, codes.float() * each

    return quantize


def fp8_tensor(shape: tuple[int, ...]) -> Quantizer:
    """E4M3 with one scale of a given shape for the whole matrix, and one for activations, which nobody reads."""

    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = (weight.abs().max() / 448).float()
        codes = (weight / scale).to(FP8)
        parts = {"weight": codes, "weight_scale": scale.reshape(shape), "input_scale": torch.ones(())}
        return parts, codes.float() * scale

    return quantize


def int8_channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Signed bytes with a bfloat16 scale for each row."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    codes = (weight / scales.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def quantize_folder(folder: Path, quantizer: Quantizer, said: Mapping[str, Any], left: tuple[str, ...] = ()) -> Tensors:
    """Quantizes the matrices of a folder's decoder layers in place, but for modules with one of `left` in their names,
    writes `said` into its config.json, and returns the floats of every tensor."""
    stored: Tensors = {}
    floats: Tensors = {}
    for name, value in safetensors.torch.load_file(folder / "model.safetensors").items():
        floats[name] = value.float()
        if value.dim() == 2 and ".layers." in name and not any(part in name for part in left):
            parts, floats[name] = quantizer(value.float())
            stored |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
        else:
            stored[name] = value
    save(folder, stored)
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(raw | {"quantization_config": dict(said)}), encoding="utf-8")
    return floats


def save(folder: Path, tensors: Tensors, file: str = "model.safetensors") -> None:
    """Writes tensors to one file of a folder."""
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file)
