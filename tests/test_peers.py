"""The arithmetic of `benchmarks/peers` that needs none of the tools: llama.cpp's names, rows and importance matrix."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import helper, numpy_helper

from benchmarks.answering import Material
from benchmarks.dequantized import dequantized_folder
from benchmarks.peers import autoround, llama_cpp
from benchmarks.peers.imatrix import second_moments, write_imatrix
from benchmarks.peers.onnx_model import ONNXWeights
from benchmarks.peers.rows import Row
from benchmarks.peers.sampled import sampled_sequences
from benchmarks.peers.tool import PeerError, run_tool
from benchmarks.real import wanted
from benchmarks.table import table
from tests.gguf_files import from_checkpoint
from tests.quantized_folders import gptq, quantize_folder
from tests.random_models import make_checkpoint
from toolkit.checkpoint.gguf_names import gguf_name, rotated_heads, to_halves, to_neighbours
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.weights import expected_tensors
from toolkit.evaluate.tasks import Question, Task
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks
from toolkit.reference.decoder import embed, reference_logits, rms_norm
from toolkit.report.sections import Answered, Divergence, Histogram


def test_gguf_names_are_distinct_and_llama_cpps(tiny_r1: Path) -> None:
    names = {name: gguf_name(name) for name in expected_tensors(open_checkpoint(tiny_r1).config)}
    assert len(set(names.values())) == len(names)
    assert names["model.embed_tokens.weight"] == "token_embd.weight"
    assert names["lm_head.weight"] == "output.weight"
    assert names["model.layers.3.self_attn.k_proj.bias"] == "blk.3.attn_k.bias"
    assert names["model.layers.0.self_attn.o_proj.weight"] == "blk.0.attn_output.weight"
    assert names["model.layers.2.post_attention_layernorm.weight"] == "blk.2.ffn_norm.weight"


def test_rows_of_a_head_alternate_between_its_halves() -> None:
    rows = np.arange(12)[:, None] * np.ones((1, 2))
    moved = to_neighbours(rows, heads=2)
    assert moved[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert np.array_equal(to_halves(moved, heads=2), rows)


def test_rotating_neighbours_of_moved_rows_is_rotating_halves() -> None:
    # What the permutation is for, in its own terms: complex pairs turned by the same angles.
    x, angles = np.random.default_rng(0).standard_normal((2, 8)), np.array([0.3, 1.1, 2.0, 4.0])
    halves = (x[:, :4] + 1j * x[:, 4:]) * np.exp(1j * angles)
    moved = to_neighbours(x.reshape(16), heads=2).reshape(2, 8)
    assert np.allclose((moved[:, ::2] + 1j * moved[:, 1::2]) * np.exp(1j * angles), halves)


def test_only_llamas_queries_and_keys_change_places(tiny_r1: Path, stories260k: Path) -> None:
    llama, qwen = open_checkpoint(stories260k).config, open_checkpoint(tiny_r1).config
    assert rotated_heads(llama, "model.layers.0.self_attn.q_proj.weight") == 8
    assert rotated_heads(llama, "model.layers.0.self_attn.k_proj.weight") == 4
    assert rotated_heads(llama, "model.layers.0.self_attn.v_proj.weight") is None
    assert rotated_heads(qwen, "model.layers.0.self_attn.q_proj.weight") is None


def test_imatrix_bytes(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    write_imatrix(path, {"model.layers.1.mlp.up_proj.weight": np.array([0.5, 2], np.float32)}, chunks=3)
    name = b"blk.1.ffn_up.weight"
    expected = struct.pack("<ii19siiff", 1, 19, name, 3, 2, 1.5, 6.0) + struct.pack("<ii", 3, 0)
    assert path.read_bytes() == expected


def test_second_moments_are_means_over_all_tokens_of_what_a_linear_reads(stories260k: Path) -> None:
    checkpoint = open_checkpoint(stories260k)
    config, source = checkpoint.config, checkpoint.source
    sequences = [[1, 403, 7, 9], [1, 5]]
    moments = second_moments(config, source, sequences)
    assert len(moments) == 7 * config.num_hidden_layers
    gain = source.read("model.layers.0.input_layernorm.weight")
    read = np.concatenate([rms_norm(embed(source, ids), gain, config.rms_norm_eps) for ids in sequences])
    for module in ("q_proj", "k_proj", "v_proj"):
        found = moments[f"model.layers.0.self_attn.{module}.weight"]
        assert np.allclose(found, np.mean(read.astype(np.float64) ** 2, axis=0), rtol=1e-6)
    assert moments["model.layers.4.mlp.down_proj.weight"].shape == (config.intermediate_size,)


def test_sampled_text_is_what_the_whole_forward_would_draw(stories260k: Path) -> None:
    config, source = (checkpoint := open_checkpoint(stories260k)).config, checkpoint.source
    (ids,) = sampled_sequences(config, source, tokens=100, seed=3)
    noise = np.random.default_rng(3).gumbel(size=(len(ids) - 1, config.vocab_size))
    logits = reference_logits(config, source, [ids])[0][:-1]
    assert ids == [config.bos_token_id, *(logits + noise).argmax(axis=-1).tolist()]


def test_stacked_matrices_of_the_builder_are_taken_apart(tmp_path: Path, stories260k: Path) -> None:
    checkpoint, path = open_checkpoint(stories260k), tmp_path / "model.onnx"
    expected, nbytes = _write_builder_model(path)
    weights = ONNXWeights(path, checkpoint)
    assert not weights.config.tie_word_embeddings
    for name, values in expected.items():
        assert np.array_equal(weights.read(name), values), name
        assert np.array_equal(weights.read_rows(name, 3, 7), values[3:7]), name
    norm = "model.layers.1.input_layernorm.weight"
    assert np.array_equal(weights.read(norm), checkpoint.source.read(norm))
    assert weights.matrix_bytes() == nbytes
    assert weights.formats() == {"4-bit": 4 * 5 + 1, "4-bit with zero points": 5, "float32 embedding": 1}


def test_a_tied_embedding_is_the_heads_own_numbers(tmp_path: Path, stories260k: Path) -> None:
    expected, nbytes = _write_builder_model(tmp_path / "model.onnx", tied=True)
    weights = ONNXWeights(tmp_path / "model.onnx", open_checkpoint(stories260k))
    assert np.array_equal(weights.read_rows("model.embed_tokens.weight", 5, 9), expected["lm_head.weight"][5:9])
    assert weights.matrix_bytes() == nbytes


def test_a_matrix_the_builder_did_not_write_is_missed(tmp_path: Path, stories260k: Path) -> None:
    _write_builder_model(tmp_path / "model.onnx", left_out="/model/layers.2/mlp/down_proj/MatMul_Q4")
    with pytest.raises(PeerError, match=r"model\.layers\.2\.mlp\.down_proj"):
        ONNXWeights(tmp_path / "model.onnx", open_checkpoint(stories260k))


@pytest.mark.parametrize("folder", ["stories260k", "tiny_r1"])
def test_a_dequantized_folder_names_the_class_that_transformers_makes_of_it(
    folder: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """onnxruntime-genai's builder goes by it."""
    file = from_checkpoint(request.getfixturevalue(folder)).write(tmp_path / "model.gguf")
    made = dequantized_folder(file, tmp_path / "folder").folder
    config = transformers.AutoConfig.from_pretrained(made)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert config.architectures == [type(model).__name__]


GPTQ_4 = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def test_autorounds_matrices_are_read_and_all_that_stands_beside_their_codes_is_counted(tmp_path: Path) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    for folder in (plain, out / "checkpoint-w4g32"):
        make_checkpoint("Qwen2", WIDE, folder)
    floats = quantize_folder(out / "checkpoint-w4g32", gptq(4, 32), GPTQ_4)
    checkpoint = open_checkpoint(plain)
    weights = autoround.AutoRoundWeights(autoround.written(out), checkpoint)
    for name, value in floats.items():
        assert np.array_equal(weights.read(name), value.numpy()), name
    down = "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(weights.read_rows(down, 3, 7), floats[down].numpy()[3:7])
    shapes = [shape for name, shape in expected_tensors(checkpoint.config).items() if ".layers." in name]
    linears = [shape for shape in shapes if len(shape) == 2]
    # Codes of half a byte; a float16 scale and a zero point of four bits a group; the group of each column in int32.
    nbytes = sum(rows * columns // 2 + rows * columns // 32 * 2.5 + 4 * columns for rows, columns in linears)
    count = sum(rows * columns for rows, columns in linears)
    assert weights.linear_bits_per_weight() == 8 * nbytes / count
    embedding = checkpoint.source.read("model.embed_tokens.weight")
    tables = 1 if checkpoint.config.tie_word_embeddings else 2
    assert weights.matrix_bytes() == nbytes + tables * 4 * embedding.size
    assert "F32 model.embed_tokens" in weights.floats()


def test_a_linear_that_autoround_left_alone_is_said(tmp_path: Path) -> None:
    make_checkpoint("Qwen2", WIDE, tmp_path / "checkpoint-w4g32")
    plain = open_checkpoint(tmp_path / "checkpoint-w4g32")
    quantize_folder(tmp_path / "checkpoint-w4g32", gptq(4, 32), GPTQ_4, left=("up_proj",))
    with pytest.raises(PeerError, match=r"model\.layers\.0\.mlp\.up_proj\.weight in floats"):
        autoround.AutoRoundWeights(autoround.written(tmp_path), plain)
    with pytest.raises(PeerError, match="holds no folder"):
        autoround.written(tmp_path / "checkpoint-w4g32")


def test_a_tool_is_measured_and_its_complaint_is_the_reason_it_failed(tmp_path: Path) -> None:
    hold = "import time; held = b'x' * (200 << 20); time.sleep(.2)"
    cost = run_tool([sys.executable, "-c", hold], tmp_path / "log")
    assert cost.wall_s > 0.2 and 200 << 20 < cost.peak_rss_bytes < 300 << 20
    with pytest.raises(PeerError, match=r"failed with 3: no such tensor"):
        run_tool([sys.executable, "-c", "print('no such tensor'); raise SystemExit(3)"], tmp_path / "log")
    with pytest.raises(PeerError, match=r"failed with 1: CMake Error: no compiler \("):
        says = "CMake Error: no compiler\nSee also this.log\n"
        run_tool([sys.executable, "-c", f"print({says!r}); raise SystemExit(1)"], tmp_path / "log")
    with pytest.raises(PeerError, match="cannot be started"):
        run_tool([str(tmp_path / "nowhere")], tmp_path / "log")


def _write_builder_model(path: Path, left_out: str = "", tied: bool = False) -> tuple[dict[str, np.ndarray], int]:
    """Nodes and constants as onnxruntime-genai 0.18 names them for stories260k's shape; the dequantized matrices by the
    checkpoint's names, and the bytes of all constants. Nothing joins the nodes."""
    generator, matrices = np.random.default_rng(0), dict[str, np.ndarray]()
    constants, nodes = list[onnx.TensorProto](), list[onnx.NodeProto]()

    def linear(node: str, parts: dict[str, int], in_features: int, symmetric: bool = True) -> None:
        spec = QuantSpec(4, 32, symmetric)
        blocks = quantize_blocks(generator.standard_normal((sum(parts.values()), in_features), np.float32), spec)
        zeros = [] if blocks.zero_points is None else [blocks.zero_points.reshape(-1)]
        arrays: list[np.ndarray] = [blocks.packed, blocks.scales, *zeros]
        inputs = [f"{node}/{k}" for k in range(len(arrays))]
        constants.extend(numpy_helper.from_array(a, name) for a, name in zip(arrays, inputs, strict=True))
        shape: dict[str, Any] = {"N": sum(parts.values()), "K": in_features, "bits": 4, "block_size": 32}
        nodes.append(helper.make_node("MatMulNBits", ["x", *inputs], ["y"], node, domain="com.microsoft", **shape))
        values, start = dequantize_blocks(blocks, spec, in_features), 0
        for name, rows in parts.items():
            matrices[f"{name}.weight"] = values[start : start + rows]
            start += rows

    for i in range(5):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        stacked = {f"{attention}.q_proj": 64, f"{attention}.k_proj": 32, f"{attention}.v_proj": 32}
        linear(f"/model/layers.{i}/attn/qkv_proj/MatMul_Q4", stacked, 64, symmetric=False)
        linear(f"/model/layers.{i}/attn/o_proj/MatMul_Q4", {f"{attention}.o_proj": 64}, 64)
        linear(f"/model/layers.{i}/mlp/gate_proj/MatMul_Q4", {f"{mlp}.gate_proj": 172}, 64)
        linear(f"/model/layers.{i}/mlp/up_proj/MatMul_Q4", {f"{mlp}.up_proj": 172}, 64)
        linear(f"/model/layers.{i}/mlp/down_proj/MatMul_Q4", {f"{mlp}.down_proj": 64}, 172)
    linear("/lm_head/MatMul_Q4", {"lm_head": 512}, 64)
    gather = "/model/embed_tokens/Gather"
    if tied:
        inputs = ["/model/embed_tokens/Reshape/output_0", "input_ids", "/lm_head/MatMul_Q4/1"]
        nodes.append(helper.make_node("GatherBlockQuantized", inputs, ["x"], f"{gather}BlockQuantized"))
    else:
        matrices["model.embed_tokens.weight"] = generator.standard_normal((512, 64), np.float32)
        constants.append(numpy_helper.from_array(matrices["model.embed_tokens.weight"], "embedding"))
        nodes.append(helper.make_node("Gather", ["embedding", "input_ids"], ["x"], gather))
    kept = [node for node in nodes if node.name != left_out]
    onnx.save(helper.make_model(helper.make_graph(kept, "model", [], [], constants)), path)
    return matrices, sum(numpy_helper.to_array(constant).nbytes for constant in constants)


def test_llama_cpp_alone_is_taken_as_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip applies `--no-binary :all:` to what a package is built with too, and would build cmake for half an hour."""
    commands: list[list[str]] = []

    def run(command: list[str], log: Path) -> None:
        commands.append(command)
        raise PeerError("not downloaded here")

    monkeypatch.setattr(llama_cpp, "run_tool", run)
    monkeypatch.setattr(llama_cpp, "program", lambda name: name)
    with pytest.raises(PeerError, match="not downloaded here"):
        llama_cpp.llama_cpp(tmp_path)
    (command,) = commands
    assert command[command.index("--no-binary") + 1] == "llama-cpp-python"


def test_a_rows_whole_name_means_that_row_alone() -> None:
    names = ["best", "best, budget 4.9", "llama.cpp q4_k_m", "llama.cpp q4_k_m+imatrix"]
    assert [name for name in names if wanted(name, ["best"], names)] == ["best"]
    assert [name for name in names if wanted(name, ["llama.cpp q4_k_m"], names)] == ["llama.cpp q4_k_m"]
    assert [name for name in names if wanted(name, ["budget", "imatrix"], names)] == [names[1], names[3]]
    assert [name for name in names if wanted(name, [""], names)] == names


def test_a_table_sets_answers_beside_the_checkpoints_question_by_question() -> None:
    figures = Divergence(1.0, 0.02, 0.01, 0.1, 0.3, 0.9, 5.0, Histogram((), ()))
    row = Row("ours", 4.5, figures, figures, 1.0, 1, "note", Answered(0.5, 10.0, 0.0, 0.2), right=(0, 2, 3))
    task = Task("four", tuple(Question(k + 1, "?", False, "1", "exact") for k in range(4)))
    text = table(Material([[1]], [], task), [row], {}, Answered(0.5, 9.0, 0.0, 0.2), right=(0, 1))
    # One lost and two won of four: +1 in 4, with the deviation of (0, -1, 1, 1) over the root of 4.
    spread = np.std([0, -1, 1, 1], ddof=1) / 2
    assert f"1 answers became wrong and 2 right, +25.0 ± {100 * spread:.1f} points" in text
