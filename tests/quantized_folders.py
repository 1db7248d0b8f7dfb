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


def _grouped(weight: torch.Tensor, groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes from 0 on, and for each row and group a float16 scale and a zero point, 0 in some rows; `groups` has the
    group of each column."""
    count, most = int(groups.max()) + 1, 2**bits - 1
    of = [weight[:, groups == g] for g in range(count)]
    low = torch.stack([one.amin(1).clamp(max=0) for one in of], 1)
    high = torch.stack([one.amax(1).clamp(min=0) for one in of], 1)
    scales = ((high - low) / (most - 1)).clamp(min=1e-4).half()
    zeros = (-low / scales.float()).round().clamp(1, most)
    zeros[::7] = 0
    codes = (weight / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, most)
    return codes.long(), scales, zeros.long()


def _restored(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return (codes - zeros[:, groups]).float() * scales.float()[:, groups]


def _words(codes: torch.Tensor, bits: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Codes along the last axis in words of 32 bits, the first lowest, or the one that `order` names; padded with
    zeros."""
    per = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    words = sum(padded[..., column] << (bits * place) for place, column in enumerate(order or range(per)))
    assert isinstance(words, torch.Tensor)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int()


def gptq(bits: int, size: int, shuffled: bool = False, version: int = 1, bias: bool = False) -> Quantizer:
    """GPTQ's words along the input, zero points less one in the first version (word by word, as GPTQModel does), act
    order where `shuffled`."""

    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = torch.arange(weight.shape[1]) // size
        if shuffled:
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))]
        codes, scales, zeros = _grouped(weight, groups, bits)
        parts = {
            "qweight": _words(codes, bits).T,
            "qzeros": _words(zeros.T, bits) - (_words(torch.ones_like(zeros.T), bits) if version == 1 else 0),
            "scales": scales.T,
            "g_idx": groups.int(),
        }
        beside = {"bias": torch.zeros(len(weight))} if bias else {}
        return parts | beside, _restored(codes, scales, zeros, groups)

    return quantize


def awq(size: int) -> Quantizer:
    """AWQ's words along the output, in its kernels' order."""

    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups, order = torch.arange(weight.shape[1]) // size, (0, 2, 4, 6, 1, 3, 5, 7)
        codes, scales, zeros = _grouped(weight, groups, 4)
        parts = {"qweight": _words(codes.T, 4, order), "qzeros": _words(zeros.T, 4, order), "scales": scales.T}
        return parts, _restored(codes, scales, zeros, groups)

    return quantize


def packed(
    bits: int, size: int, symmetric: bool = True, shuffled: bool = False, plain_zeros: bool = False
) -> Quantizer:
    """compressed-tensors' words along a row, around the middle or with zero points, which `plain_zeros` does not pack;
    with its act order where `shuffled`."""

    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = torch.arange(weight.shape[1]) // size
        if shuffled:
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(2))]
        codes, scales, zeros = _grouped(weight, groups, bits)
        if symmetric:
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        scales = scales.to(torch.bfloat16)
        parts = {
            "weight_packed": _words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            plain = (zeros - 2 ** (bits - 1)).to(torch.int8)
            parts["weight_zero_point"] = plain if plain_zeros else _words(zeros.T, bits).T
        if shuffled:
            parts["weight_g_idx"] = groups.int()
        return parts, _restored(codes, scales, zeros, groups)

    return quantize


def fp4(way: str) -> Quantizer:
    """FP4 in pairs as `modelopt` and `nvfp4` (of compressed-tensors) have it, and `mxfp4`."""

    def quantize(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        size = 32 if way == "mxfp4" else 16
        count = -(-weight.shape[1] // size)
        padded = torch.nn.functional.pad(weight, (0, count * size - weight.shape[1]))
        largest = padded.unflatten(1, (count, size)).abs().amax(2).clamp(min=1e-6)
        whole = (weight.abs().max() / 6 / 448).float()
        if way == "mxfp4":
            scales = (torch.floor(torch.log2(largest)) - 2 + 127).to(torch.uint8)
            steps, beside = torch.exp2(scales.float() - 127), {}
        elif way == "modelopt":
            scales = (largest / 6 / whole).to(FP8)
            steps, beside = scales.float() * whole, {"weight_scale_2": whole}
        else:
            inverse = (1 / whole).reshape(1)
            scales = (largest / 6 * inverse).to(FP8)
            steps, beside = scales.float() / inverse, {"weight_global_scale": inverse}
        each = steps.repeat_interleave(size, 1)[:, : weight.shape[1]]
        levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = (weight.abs() / each.clamp(min=1e-30)).unsqueeze(-1).sub(levels).abs().argmin(-1)
        values = torch.where(weight < 0, -levels[nearest], levels[nearest])
        codes = nearest + 8 * (weight < 0)
        pairs = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
        name = "weight" if way == "modelopt" else "weight_packed"
        return {name: pairs, "weight_scale": scales, **beside}, values * each

    return quantize


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
