"""Folders of quantized safetensors are read as the floats that torch makes of their codes and scales."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.checkpoint_folders import set_keys
from tests.command_line import called
from tests.graphs import write_graphs
from tests.quantized_folders import (
    BLOCKS,
    FP8,
    Quantizer,
    Tensors,
    awq,
    fp4,
    fp8_blocks,
    fp8_tensor,
    gptq,
    int8_channels,
    packed,
    quantize_folder,
    save,
)
from tests.random_models import CASES, make_checkpoint
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.quantized_blocks import E4M3, E8M0
from toolkit.checkpoint.quantized_tensors import coded_tensors
from toolkit.checkpoint.safetensors import read_header
from toolkit.checkpoint.weights import FileWeights, WeightSource
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.evaluate.positions import open_positions

# Widths that no block of 128 divides, of both families that people publish in FP8.
WIDE: Final[dict[str, Any]] = {"hidden_size": 192, "intermediate_size": 200, "head_dim": 48}
DOWN: Final = "model.layers.1.mlp.down_proj"
IDS: Final = [int(i) for i in np.random.default_rng(3).integers(3, 96, 40)]


def _compressed(way: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}
    return {"quant_method": "compressed-tensors", "format": way, "config_groups": {"group_0": group}}


FLOAT8: Final[dict[str, tuple[Quantizer, dict[str, Any]]]] = {
    "deepseek": (fp8_blocks((128, 128)), BLOCKS),
    "qwen3": (fp8_blocks((128, 128), torch.bfloat16), BLOCKS),
    "half-scales": (fp8_blocks((128, 128), torch.float16), BLOCKS),
    "powers-of-two": (fp8_blocks((128, 128), torch.float8_e8m0fnu), BLOCKS),
    "oblong-blocks": (fp8_blocks((16, 48)), {**BLOCKS, "weight_block_size": [16, 48]}),
    "static": (fp8_tensor(()), {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "fbgemm": (fp8_blocks((1, 10**9), name="weight_scale"), {"quant_method": "fbgemm_fp8"}),
    "modelopt": (fp8_tensor(()), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "tensor": (fp8_tensor((1,)), _compressed("float-quantized", strategy="tensor")),
    "channel": (
        fp8_blocks((1, 10**9), torch.bfloat16, "weight_scale"),
        _compressed("float-quantized", strategy="channel"),
    ),
    "block": (
        fp8_blocks((64, 32), name="weight_scale"),
        _compressed("float-quantized", strategy="block", block_structure=[64, 32]),
    ),
    "block-as-text": (
        fp8_blocks((64, 32), name="weight_scale"),
        _compressed("float-quantized", strategy="block", block_structure="64x32"),
    ),
    "int8": (int8_channels, _compressed("int-quantized", strategy="channel", type="int")),
}


def _gptq(bits: int, size: int, way: str = "gptq") -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": way}


def _auto_round(way: str | None) -> dict[str, Any]:
    said = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int", "sym": False}
    return {**said, **({"backend": "auto"} if way is None else {"packing_format": way})}


def _packed(bits: int, **weights: Any) -> dict[str, Any]:
    return _compressed("pack-quantized", **{"num_bits": bits, "type": "int", **weights})


# A width that neither groups nor words divide is 200: 13 groups of 16, cut.
PACKED: Final[dict[str, tuple[str, Quantizer, dict[str, Any]]]] = {
    "gptq": ("INT4", gptq(4, 32), _gptq(4, 32)),
    "gptq-act-order": ("INT4", gptq(4, 32, shuffled=True), _gptq(4, 32)),
    "gptq-v2": ("INT4", gptq(4, 32, version=2), _gptq(4, 32, "gptq_v2")),
    "gptq-8": ("INT8", gptq(8, 64), _gptq(8, 64)),
    "gptq-2": ("INT2", gptq(2, 32), _gptq(2, 32)),
    "gptq-whole-rows": ("INT4", gptq(4, 10**9), _gptq(4, -1)),
    "gptq-biases-of-zeros": ("INT4", gptq(4, 32, bias=True), _gptq(4, 32)),
    "auto-round": ("INT4", gptq(4, 32), _auto_round("auto_round:auto_gptq")),
    "auto-round-unsaid": ("INT4", gptq(4, 32), _auto_round(None)),
    "auto-round-own": ("INT4", gptq(4, 32, version=2), _auto_round("auto_round")),
    "auto-round-gptqmodel": ("INT4", gptq(4, 32, version=2), _auto_round("auto_round:gptqmodel")),
    "auto-round-awq": ("INT4", awq(32), _auto_round("auto_round:auto_awq")),
    "awq": ("INT4", awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "packed": ("INT4", packed(4, 32), _packed(4, strategy="group", group_size=32)),
    "packed-channels": ("INT4", packed(4, 10**9), _packed(4, strategy="channel")),
    "packed-zeros": ("INT4", packed(4, 32, symmetric=False), _packed(4, strategy="group", group_size=32)),
    "packed-plain-zeros": (
        "INT4",
        packed(4, 32, symmetric=False, plain_zeros=True),
        _packed(4, strategy="group", group_size=32),
    ),
    "packed-act-order": (
        "INT4",
        packed(4, 32, shuffled=True),
        _packed(4, strategy="group", group_size=32, actorder="group"),
    ),
    "packed-8": ("INT8", packed(8, 10**9), _packed(8, strategy="channel")),
    "packed-8-zeros": ("INT8", packed(8, 32, symmetric=False), _packed(8, strategy="group", group_size=32)),
    "modelopt-nvfp4": ("NVFP4", fp4("modelopt"), {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4": ("NVFP4", fp4("nvfp4"), _compressed("nvfp4-pack-quantized", group_size=16)),
    "mxfp4": ("MXFP4", fp4("mxfp4"), _compressed("mxfp4-pack-quantized", group_size=32)),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_codes_are_read_as_the_formula_has_them(name: str, tmp_path: Path) -> None:
    make_checkpoint("Qwen3", WIDE, tmp_path)
    dtype, quantizer, said = PACKED[name]
    floats = quantize_folder(tmp_path, quantizer, said)
    opened = open_checkpoint(tmp_path)
    _assert_reads(opened.source, floats)
    assert opened.stored_as is not None
    assert opened.stored_as.tensors == {dtype: 14, "F32": len(floats) - 14}


def _assert_reads(source: WeightSource, floats: Tensors) -> None:
    """Every tensor, whole, by rows and streamed, is what torch has, to the bit."""
    assert sorted(source.names()) == sorted(floats)
    for name, value in floats.items():
        want = value.numpy()
        assert source.read(name).tobytes() == want.tobytes(), name
        assert source.read_rows(name, 1, len(want) - 1).tobytes() == want[1:-1].tobytes(), name
    seen: dict[str, int] = {}
    for rows in source.scan(5000):
        want = floats[rows.name].numpy()
        middle = (rows.start + rows.stop) // 2
        assert source.decode(rows, middle, rows.stop).tobytes() == want[middle : rows.stop].tobytes()
        assert source.decode(rows, rows.start, rows.stop).tobytes() == want[rows.start : rows.stop].tobytes()
        seen[rows.name] = seen.get(rows.name, 0) + rows.stop - rows.start
        rows.release()
    assert seen == {name: len(value) for name, value in floats.items()}


def test_every_code_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, codes.view(FP8).float().numpy())
    np.testing.assert_array_equal(E8M0, codes.view(torch.float8_e8m0fnu).float().numpy())


@pytest.mark.parametrize("name", FLOAT8)
def test_codes_of_a_byte_are_read_as_torch_reads_them(name: str, tmp_path: Path) -> None:
    make_checkpoint("Qwen3" if name != "fbgemm" else "Llama", WIDE, tmp_path)
    quantizer, said = FLOAT8[name]
    floats = quantize_folder(tmp_path, quantizer, said, left=("layers.0.mlp.gate_proj",))
    opened = open_checkpoint(tmp_path)
    _assert_reads(opened.source, floats)
    assert opened.stored_as is not None
    dtype = "I8" if name == "int8" else "F8_E4M3"
    assert opened.stored_as.tensors == {"F32": len(floats) - 13, dtype: 13}
    words = f"the weights are those of {opened.stored_as.words}, dequantized"
    assert words in opened.notes and str(said["quant_method"]) in words


def test_experts_of_gpt_oss_are_transformers_to_the_bit(tmp_path: Path) -> None:
    """By the expert, as what reads them asks; transformers has them input features first too."""
    codes = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = torch.randint(0, 256, (3, 20, 4, 16), dtype=torch.uint8, generator=codes)
    # No subnormal floats: onnxruntime-genai, once in a process, lets them count as zeros.
    scales = torch.randint(0, 250, (3, 20, 4), dtype=torch.uint8, generator=codes).clamp(4, 180)
    save(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales})
    refs = read_header(tmp_path / "model.safetensors")
    left, coded = coded_tensors(refs, None, {name: (3, 128, 20)})
    assert left.keys() == {name} and left[name].shape == (3, 128, 20)
    source = FileWeights(left, [tmp_path / "model.safetensors"], coded=coded)
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    _assert_reads(source, {name: want})
    save(tmp_path, {f"{name}_blocks": blocks})
    with pytest.raises(CheckpointError, match="gate_up_proj is quantized, and _scales is missing"):
        coded_tensors(read_header(tmp_path / "model.safetensors"), None, {name: (3, 128, 20)})


def test_a_folder_of_gpt_oss_as_published_becomes_graphs_that_compute_it(tmp_path: Path) -> None:
    """Every layer's experts in MXFP4, all else in bfloat16; transformers' model of the weights it makes of them."""
    folder = tmp_path / "gpt-oss"
    model = make_checkpoint(*CASES["gpt-oss"], folder)
    codes = torch.Generator().manual_seed(1)
    model.load_state_dict({name: value.to(torch.bfloat16).float() for name, value in model.state_dict().items()})
    stored = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=codes)
        # From 2 ** -6 to 2 ** -4: weights as large as other matrices'.
        scales = torch.randint(121, 124, (experts, rows, columns // 32), dtype=torch.uint8, generator=codes)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        model.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save(folder, stored)
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    set_keys(folder / "config.json", quantization_config=said)
    opened = open_checkpoint(folder)
    assert opened.stored_as is not None and opened.stored_as.tensors["MXFP4"] == 4
    with torch.no_grad():
        oracle = model(torch.tensor([IDS])).logits[0].numpy()
    write_graphs(folder, tmp_path / "bundle")
    bundle = open_positions(tmp_path / "bundle")
    for prompt in (None, 9):
        assert np.abs(bundle.logits(IDS, prompt) - oracle).max() <= 1e-3


def test_experts_one_by_one_are_read_too(tmp_path: Path) -> None:
    """As Qwen3-30B-A3B-FP8 has them; its routers are left."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 136, "decoder_sparse_step": 1}
    make_checkpoint("Qwen3Moe", {**WIDE, **experts}, tmp_path)
    floats = quantize_folder(tmp_path, fp8_blocks((128, 128), torch.bfloat16), BLOCKS, left=("mlp.gate.",))
    opened = open_checkpoint(tmp_path)
    _assert_reads(opened.source, floats)
    assert opened.stored_as is not None and opened.stored_as.tensors["F8_E4M3"] == 2 * (4 + 4 * 3)


def test_codes_beside_the_decoder_are_in_nobodys_way(tmp_path: Path) -> None:
    """A head for more tokens or a tower for pictures may be in FP8 too; a layer too many is named as such."""
    make_checkpoint("Qwen3", WIDE, tmp_path)
    floats = quantize_folder(tmp_path, fp8_blocks((128, 128)), BLOCKS)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    codes = {part: stored[f"{DOWN}.{part}"].clone() for part in ("weight", "weight_scale_inv")}
    save(tmp_path, stored | {f"mtp.fc.{part}": tensor for part, tensor in codes.items()})
    opened = open_checkpoint(tmp_path)
    _assert_reads(opened.source, floats)
    assert any("2 tensors beside the decoder, such as mtp.fc.weight" in note for note in opened.notes)
    save(tmp_path, stored | {f"model.layers.2.mlp.up_proj.{part}": tensor for part, tensor in codes.items()})
    with pytest.raises(CheckpointError, match="num_hidden_layers is 2 in its config"):
        open_checkpoint(tmp_path)


def test_inspect_says_what_is_in_a_folder(tmp_path: Path) -> None:
    make_checkpoint("Qwen3", WIDE, tmp_path)
    quantize_folder(tmp_path, fp8_blocks((128, 128)), BLOCKS)
    inspected = called("inspect", str(tmp_path), "--json")
    assert inspected.returncode == 0, inspected.stderr
    facts = json.loads(inspected.stdout)
    assert facts["file_type"] == "fp8" and facts["dtypes"] == {"F32": 11, "F8_E4M3": 14}
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    floats = {name for name in stored if f"{name}_scale_inv" not in stored and not name.endswith("_inv")}
    nbytes = sum(tensor.nbytes for tensor in stored.values())
    weights = sum(tensor.numel() for name, tensor in stored.items() if not name.endswith("_inv"))
    assert facts["bits_per_weight"] == round(8 * nbytes / weights, 3) and len(floats) == 11


def test_scales_may_lie_in_another_shard(tmp_path: Path) -> None:
    make_checkpoint("Qwen3", WIDE, tmp_path)
    floats = quantize_folder(tmp_path, fp8_blocks((128, 128)), BLOCKS)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for number, there in enumerate((False, True), 1):
        shard = {name: value for name, value in stored.items() if name.endswith("_inv") is there}
        save(tmp_path, shard, f"model-{number:05}-of-00002.safetensors")
    _assert_reads(open_checkpoint(tmp_path).source, floats)


def test_modelopts_own_file_says_it_too(tmp_path: Path) -> None:
    make_checkpoint("Qwen3", WIDE, tmp_path)
    floats = quantize_folder(tmp_path, fp8_tensor(()), {})
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}), encoding="utf-8"
    )
    opened = open_checkpoint(tmp_path)
    _assert_reads(opened.source, floats)
    assert opened.stored_as is not None and opened.stored_as.file_type == "modelopt FP8"


@pytest.mark.parametrize(("family", "way"), [("Qwen3", "fp8"), ("Llama", "fp8"), ("Llama", "gptq")])
def test_a_bundle_is_that_of_the_floats_that_torch_makes(family: str, way: str, tmp_path: Path, tiny_r1: Path) -> None:
    """The whole way: logits of equal graphs over equal weights are equal."""
    written: list[dict[str, bytes]] = []
    for kind in (way, "floats"):
        folder = tmp_path / kind
        make_checkpoint(family, {**WIDE, "vocab_size": 1024, "max_position_embeddings": 128}, folder)
        for path in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (folder / path).write_bytes((tiny_r1 / path).read_bytes())
        if kind == "fp8":
            floats = quantize_folder(folder, fp8_blocks((128, 128)), BLOCKS)
        elif kind == "gptq":
            floats = quantize_folder(folder, gptq(4, 32, shuffled=True), _gptq(4, 32))
        else:
            save(folder, floats)
        out = tmp_path / f"{kind}-bundle"
        words = ["cpu", "--checkpoint", str(folder), "--precision", "fp32", "--no-validate", "--out", str(out)]
        made = called("export", *words)
        assert made.returncode == 0, made.stderr
        assert (f"those of a {way}" in made.stderr) is (kind == way)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert ("source" in report["quantization"]) is (kind == way)
        written.append({path.name: path.read_bytes() for path in out.iterdir() if ".onnx" in path.name})
    assert written[0] == written[1] and any(name.endswith(".data") for name in written[0])


def _spoil(folder: Path, what: str) -> None:
    """Makes one thing wrong with a folder in FP8."""
    stored, config = safetensors.torch.load_file(folder / "model.safetensors"), folder / "config.json"
    scale, raw = f"{DOWN}.weight_scale_inv", json.loads(config.read_text(encoding="utf-8"))
    said = raw["quantization_config"]
    if what == "missing scale":
        del stored[scale]
    elif what == "scale of a wrong shape":
        stored[scale] = torch.ones(3, 2)
    elif what == "scale of a wrong dtype":
        stored[scale] = torch.ones(2, 2, dtype=torch.int32)
    elif what == "NaN scale":
        stored[scale][1, 1] = float("nan")
    elif what == "NaN code":
        stored[f"{DOWN}.weight"].view(torch.uint8)[3, 5] = 0x7F
    elif what == "fmt":
        said["fmt"] = "e5m2"
    elif what == "codes of e5m2":
        stored[f"{DOWN}.weight"] = stored[f"{DOWN}.weight"].to(torch.float8_e5m2)
    elif what == "block size":
        said["weight_block_size"] = [128, 0]
    elif what == "quant_method":
        said["quant_method"] = "fp9"
    elif what == "scale without codes":
        stored[f"{DOWN}.weight"] = stored[f"{DOWN}.weight"].float()
    save(folder, stored)
    config.write_text(json.dumps(raw), encoding="utf-8")


SPOILT: Final = {
    "missing scale": r"down_proj.weight is F8_E4M3 \[192, 200\] and quantized, and its scale is missing, .*_inv",
    "scale of a wrong shape": r"weight_scale_inv is F32 \[3, 2\] beside \[192, 200\] weights, expected .*\[2, 2\]",
    "scale of a wrong dtype": "weight_scale_inv is I32, expected one of F32",
    "NaN scale": "weight_scale_inv holds 1 NaN or infinite scales",
    "NaN code": "down_proj.weight holds 1 NaN or infinite values",
    "fmt": "fmt of quantization_config is 'e5m2', expected 'e4m3'",
    "codes of e5m2": "quantized already.*weight_scale_inv",
    "block size": "weight_block_size of quantization_config is .*expected rows and columns",
    "quant_method": "already quantized by fp9, which is not read",
    "scale without codes": "quantized already.*weight_scale_inv",
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_is_one_line_and_nothing_is_written(what: str, tmp_path: Path, tiny_r1: Path) -> None:
    folder, out = tmp_path / "fp8", tmp_path / "bundle"
    make_checkpoint("Qwen3", {**WIDE, "vocab_size": 1024, "max_position_embeddings": 128}, folder)
    for path in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / path).write_bytes((tiny_r1 / path).read_bytes())
    quantize_folder(folder, fp8_blocks((128, 128)), BLOCKS)
    _spoil(folder, what)
    words = ["cpu", "--checkpoint", str(folder), "--precision", "fp32", "--no-validate", "--out", str(out)]
    made = called("export", *words)
    (line,) = [line for line in made.stderr.splitlines() if line.startswith("error:")]
    assert made.returncode == 2 and re.search(SPOILT[what], line), made.stderr
    left = ["bundle.partial"] if what == "NaN code" else []  # as with any NaN that is met on the way
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "fp8"]


def _said(**values: Any) -> Callable[[dict[str, Any], Tensors], object]:
    return lambda said, _: said.update(values)


def _without(part: str) -> Callable[[dict[str, Any], Tensors], object]:
    return lambda _, stored: stored.pop(f"{DOWN}.{part}")


def _with(part: str, value: torch.Tensor) -> Callable[[dict[str, Any], Tensors], object]:
    return lambda _, stored: stored.update({f"{DOWN}.{part}": value})


PACKED_SPOILT: Final[dict[str, tuple[str, Callable[[dict[str, Any], Tensors], object], str]]] = {
    "gptq without scales": ("gptq", _without("scales"), "quantized, and scales is missing beside its codes"),
    "gptq without zeros": ("gptq", _without("qzeros"), "quantized, and qzeros is missing beside its codes"),
    "gptq's scales": ("gptq", _with("scales", torch.ones(7, 5)), r"scales is F32 \[7, 5\], expected .* \[7, 192\]"),
    "gptq's zeros": ("gptq", _with("qzeros", torch.ones(7, 24)), r"qzeros is F32 \[7, 24\], expected I32 \[7, 24\]"),
    "gptq's groups": ("gptq", _with("g_idx", torch.full((200,), 7, dtype=torch.int32)), "from 7 to 7, expected 0 to 6"),
    "gptq's bits": ("gptq", _with("qweight", torch.ones(20, 192, dtype=torch.int32)), "holds 3 bits a weight"),
    "gptq's bias": ("gptq", _with("bias", torch.ones(192)), "down_proj.bias is not zero"),
    "gptq for marlin": ("gptq", _said(checkpoint_format="marlin"), "is 'marlin', expected one of gptq"),
    "gptq unsaid": ("gptq", lambda said, _: said.clear(), "by GPTQ or AWQ, and config.json does not say by which"),
    "gptq's NaN": ("gptq", _with("scales", torch.full((7, 192), torch.nan)), "scales holds 1344 NaN"),
    "auto-round's way": ("auto-round", _said(packing_format="auto_round:fake"), "has packing_format 'auto_round:fake'"),
    "auto-round's type": ("auto-round", _said(data_type="mx_fp"), "data_type 'mx_fp', expected one of auto_round:"),
    "awq's version": ("awq", _said(version="gemv"), "version 'gemv', expected 4 and 'gemm'"),
    "awq's shape": ("awq", _with("qweight", torch.ones(24, 192, dtype=torch.int32)), r"expected I32 \[200, 24\]"),
    "packed without scales": ("packed", _without("weight_scale"), "weight_scale is missing beside its codes"),
    "packed sparsely": ("packed", _said(format="marlin-24"), "is 'marlin-24', expected one of float-quantized"),
    "packed wrongly": (
        "packed",
        _with("weight_packed", torch.ones(3, 3, dtype=torch.int32)),
        r"expected I32 \[192, 200",
    ),
    "nvfp4 without its second scale": ("nvfp4", _without("weight_global_scale"), "second scale is missing"),
    "modelopt's algorithm": ("modelopt-nvfp4", _said(quant_algo="W4A8_AWQ"), "is 'W4A8_AWQ', expected one of FP8"),
}


@pytest.mark.parametrize("what", PACKED_SPOILT)
def test_what_is_wrong_with_packed_codes_is_said(what: str, tmp_path: Path) -> None:
    name, spoil, refusal = PACKED_SPOILT[what]
    _, quantizer, said = PACKED[name]
    make_checkpoint("Qwen3", WIDE, tmp_path)
    quantize_folder(tmp_path, quantizer, said)
    stored, config = safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path / "config.json"
    raw = json.loads(config.read_text(encoding="utf-8"))
    spoil(raw["quantization_config"], stored)
    save(tmp_path, stored)
    config.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises((CheckpointError, UnsupportedError), match=refusal):
        open_checkpoint(tmp_path).source.read(f"{DOWN}.weight")
