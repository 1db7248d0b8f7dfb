"""A GGUF file is the checkpoint that it was made from: the same config, the same tensors, the same text."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command_line import called
from tests.gguf_files import GgufFile, Stored, f32, from_checkpoint
from tests.random_models import CASES, make_checkpoint
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.gguf_blocks import COMPILED_TYPES, dequantize
from toolkit.checkpoint.gguf_types import TENSOR_TYPES
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.weights import open_weights
from toolkit.errors import CheckpointError, MachineError, UnsupportedError

DATA = Path(__file__).parent / "data" / "gguf_blocks.npz"
RARE = [kind.name for kind in TENSOR_TYPES.values() if kind.block > 1 and kind.name not in COMPILED_TYPES]
# Windows, and which layers have no RoPE, are not in the files of these architectures; those with experts are not
# read, nor phi3's.
_NOT_IN_FILES = {
    "sliding_window",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "partial_rotary_factor",
}
READ = {name: case for name, case in CASES.items() if not _NOT_IN_FILES & case[1].keys()}


@pytest.mark.parametrize("dtype", COMPILED_TYPES)
def test_compiled_loops_are_the_gguf_packages_numbers_to_the_bit(dtype: str) -> None:
    data = np.load(DATA)  # written by gguf 0.19
    made = dequantize(data[f"{dtype}.raw"].reshape(-1), dtype)
    assert made.view(np.uint32).tolist() == data[f"{dtype}.values"].reshape(-1).view(np.uint32).tolist()


@pytest.mark.parametrize("dtype", RARE)
def test_rare_types_are_the_gguf_packages(dtype: str) -> None:
    pytest.importorskip("gguf", reason="rare types are read by the gguf package, an extra")
    data = np.load(DATA)
    made = dequantize(data[f"{dtype}.raw"].reshape(-1), dtype)
    assert made.view(np.uint32).tolist() == data[f"{dtype}.values"].reshape(-1).view(np.uint32).tolist()


def test_a_rare_type_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MachineError, match=r"IQ4_XS need the gguf package.*pip install 'onnx-distill-toolkit\[gguf\]'"):
        dequantize(np.zeros(136, np.uint8), "IQ4_XS")


@pytest.mark.parametrize("name", READ)
def test_a_file_is_the_checkpoint_it_was_made_from(name: str, tmp_path: Path) -> None:
    make_checkpoint(*READ[name], tmp_path)
    opened = open_checkpoint(from_checkpoint(tmp_path).write(tmp_path / "model.gguf"))
    config = read_config(tmp_path)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_ids": config.eos_token_ids, "pad_token_id": None}
    made = replace(opened.config, **{key: getattr(config, key) for key in ids})
    rope = {key: value for key, value in vars(made.rope).items() if isinstance(value, float)}
    assert rope == pytest.approx({key: vars(config.rope)[key] for key in rope}, rel=1e-6)
    model_type = "llama" if config.model_type == "mistral" else config.model_type
    assert replace(made, rope=config.rope) == replace(config, model_type=model_type)
    theirs = open_weights(tmp_path, config)
    assert sorted(opened.source.names()) == sorted(theirs.names())
    for tensor in theirs.names():
        want = theirs.read(tensor)
        np.testing.assert_array_equal(opened.source.read(tensor), want)
        np.testing.assert_array_equal(opened.source.read_rows(tensor, 1, len(want) - 1), want[1:-1])


def test_rows_that_stream_are_those_that_are_read(tmp_path: Path) -> None:
    make_checkpoint("Llama", {}, tmp_path)
    source = open_checkpoint(from_checkpoint(tmp_path).write(tmp_path / "model.gguf")).source
    seen = dict[str, int]()
    for rows in source.scan(500):
        want = source.read(rows.name)
        np.testing.assert_array_equal(source.decode(rows, rows.start, rows.stop), want[rows.start : rows.stop])
        middle = (rows.start + rows.stop) // 2
        np.testing.assert_array_equal(source.decode(rows, middle, rows.stop), want[middle : rows.stop])
        seen[rows.name] = seen.get(rows.name, 0) + rows.stop - rows.start
        rows.release()
    assert seen == {name: len(source.read(name)) for name in source.names()}


def _as_q8_0(values: Any) -> Stored:
    """An array as llama.cpp stores it in Q8_0."""
    blocks = values.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1) / 127).astype(np.float16)
    steps = np.where(scales == 0, 1, scales).astype(np.float32)[:, None]
    levels = np.clip(np.round(blocks / steps), -127, 127).astype(np.int8)
    raw = b"".join(s.tobytes() + q.tobytes() for s, q in zip(scales, levels, strict=True))
    return Stored(8, values.shape, raw)


def test_quantized_heads_change_places_too(tmp_path: Path) -> None:
    make_checkpoint("Llama", {}, tmp_path)
    file = from_checkpoint(tmp_path)
    for name, stored in file.tensors.items():
        if len(stored.shape) == 2 and stored.shape[1] % 32 == 0:
            file.tensors[name] = _as_q8_0(np.frombuffer(stored.raw, np.float32).reshape(stored.shape))
    opened = open_checkpoint(file.write(tmp_path / "model.gguf"))
    assert opened.stored_as is not None and opened.stored_as.tensors["Q8_0"] == 14
    assert 8.5 < opened.stored_as.bits_per_weight < 16
    theirs = open_weights(tmp_path, read_config(tmp_path))
    for name in theirs.names():
        want = theirs.read(name)
        assert np.abs(opened.source.read(name) - want).max() <= np.abs(want).max() / 127


def test_a_split_set_is_one_checkpoint_by_any_of_its_names(tmp_path: Path) -> None:
    make_checkpoint("Qwen2", {}, tmp_path)
    whole = from_checkpoint(tmp_path)
    names = list(whole.tensors)
    parts = [names[:3], names[3:10], names[10:]]
    for k, part in enumerate(parts):
        split = {"split.no": k, "split.count": 3, "split.tensors.count": len(names)}
        metadata = whole.metadata | split if k == 0 else split
        file = GgufFile(metadata, {name: whole.tensors[name] for name in part})
        file.write(tmp_path / f"m-{k + 1:05d}-of-00003.gguf")
    opened = open_checkpoint(tmp_path / "m-00002-of-00003.gguf")
    theirs = open_weights(tmp_path, read_config(tmp_path))
    for name in theirs.names():
        np.testing.assert_array_equal(opened.source.read(name), theirs.read(name))
    assert [origin.name for origin in opened.source.digests()] == [f"m-{k:05d}-of-00003.gguf" for k in (1, 2, 3)]
    (tmp_path / "m-00002-of-00003.gguf").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf is missing"):
        open_checkpoint(tmp_path / "m-00001-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "away").rename(tmp_path / "m-00003-of-00003.gguf")
    with pytest.raises(CheckpointError, match="says it is part 2 of 3 from 0, expected 1 of 3"):
        open_checkpoint(tmp_path / "m-00001-of-00003.gguf")


def test_side_files_go_when_the_checkpoint_does(tmp_path: Path) -> None:
    make_checkpoint("Qwen2", {}, tmp_path)
    opened = open_checkpoint(from_checkpoint(tmp_path).write(tmp_path / "model.gguf"))
    folder = opened.folder
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen2"
    del opened
    gc.collect()
    assert not folder.exists()


def test_a_file_is_inspected_planned_and_exported(tmp_path: Path) -> None:
    make_checkpoint("Llama", {"max_position_embeddings": 128, "vocab_size": 320}, tmp_path)
    file = from_checkpoint(tmp_path)
    file.metadata["tokenizer.chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = file.write(tmp_path / "small.gguf")
    inspected = called("inspect", str(path), "--json")
    assert inspected.returncode == 0, inspected.stderr
    facts = json.loads(inspected.stdout)
    assert (facts["file_type"], facts["bits_per_weight"], facts["dtypes"]) == ("F32", 32.0, {"F32": 21})
    bundle = tmp_path / "bundle"
    words = ["cpu", "--checkpoint", str(path), "--precision", "fp32", "--no-validate", "--out", str(bundle)]
    made = called("export", *words)
    assert made.returncode == 0, made.stderr
    assert "the weights are those of a F32 file of 32.00 bits a weight" in made.stderr
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["recipe"]["name"] == "small-cpu" and manifest["checkpoint"][0]["name"] == "small.gguf"
    assert json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"] == "BPE"


Change = Callable[[GgufFile], object]


def _metadata(**changes: Any) -> Change:
    def change(file: GgufFile) -> None:
        for key, value in changes.items():
            file.metadata[key.replace("__", ".")] = value

    return change


def _tensor(name: str, stored: Stored) -> Change:
    return lambda file: file.tensors.update({name: stored})


def _set(**changes: Any) -> Change:
    return lambda file: vars(file).update(changes)


ZEROS = f32(np.zeros((4, 4), np.float32))
LONG_TEXT = b"\x08\x00\x00\x00" + (1 << 40).to_bytes(8, "little")
LONG_LIST = b"\x09\x00\x00\x00\x05\x00\x00\x00" + (1 << 60).to_bytes(8, "little")
MANY_TEXTS = b"\x09\x00\x00\x00\x08\x00\x00\x00" + (1 << 50).to_bytes(8, "little")
LISTS = b"\x09\x00\x00\x00\x09\x00\x00\x00" + (1).to_bytes(8, "little")
BAD: dict[str, tuple[Change, str]] = {
    "another magic": (_set(magic=b"GGML"), "begins with b'GGML', expected b'GGUF'"),
    "version 1": (_set(version=1), "is of version 1 of GGUF, expected 2 or 3"),
    "version 4": (_set(version=4), "is of version 4 of GGUF"),
    "big-endian": (_set(version=3 << 24), "is big-endian"),
    "absurd count of tensors": (_set(claimed_tensors=1 << 62), "claims 4611686018427387904 tensors"),
    "absurd count of keys": (_set(claimed_keys=1 << 40), "claims 1099511627776 keys of metadata"),
    "more tensors than there are": (_set(claimed_tensors=500), "model.gguf"),
    "a text longer than the file": (_metadata(general__name=LONG_TEXT), "claims 1099511627776 bytes of general.name"),
    "a list longer than the file": (_metadata(general__tags=LONG_LIST), "claims 1152921504606846976 values in"),
    "more texts than the file has": (_metadata(general__tags=MANY_TEXTS), "claims 1125899906842624 texts in"),
    "a list of lists": (_metadata(general__tags=LISTS), "general.tags is a list of lists"),
    "a value of an unknown type": (_metadata(general__tags=b"\x63\x00\x00\x00"), "of the unknown type 99"),
    "a text that is no UTF-8": (
        _metadata(general__name=b"\x08\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\xff\xfe"),
        "general.name is not text in UTF-8",
    ),
    "a flag of 2": (_metadata(tokenizer__ggml__add_bos_token=b"\x07\x00\x00\x00\x02"), "neither 0 nor 1"),
    "an alignment of 33": (_metadata(general__alignment=33), "general.alignment is 33, expected a power of two"),
    "an unknown tensor type": (_tensor("blk.0.x", Stored(99, (4, 4), bytes(64))), "is of the tensor type 99"),
    "a tensor of integers": (_tensor("blk.0.x", Stored(26, (4, 4), bytes(64))), "is of the tensor type 26"),
    "a bias in blocks": (_tensor("blk.0.x", Stored(8, (32,), bytes(34))), "blk.0.x is one row in blocks of Q8_0"),
    "a tensor without dimensions": (_tensor("blk.0.x", Stored(0, (), bytes(4))), "has 0 dimensions, expected 1 to 4"),
    "a tensor of no rows": (_tensor("blk.0.x", Stored(0, (0, 4), b"")), "the shape [0, 4], which cannot be"),
    "a tensor of 2^60 rows": (_tensor("blk.0.x", Stored(0, (1 << 60, 4), b"")), "which cannot be"),
    "rows that are no blocks": (_tensor("blk.0.x", Stored(2, (1, 40), bytes(36))), "and Q4_0 has blocks of 32"),
    "tensors that overlap": (_set(offsets={"blk.0.attn_norm.weight": 32}), "expected"),
    "a tensor outside the file": (
        lambda file: file.offsets.update({list(file.tensors)[-1]: 1 << 40}),
        "start at 10995116",
    ),
    "a tensor that the config does not call for": (_tensor("blk.0.ffn_gate_exps.weight", ZEROS), "does not call for"),
    "a tensor of another shape": (_tensor("output_norm.weight", ZEROS), "model.norm.weight is F32 [4, 4], expected"),
    "a tensor that is missing": (lambda file: file.tensors.pop("output_norm.weight"), "lacks 1 tensors"),
    "no embedding": (lambda file: file.tensors.pop("token_embd.weight"), "has no token_embd.weight"),
    "another architecture": (_metadata(general__architecture="mamba"), "'mamba' is not supported, expected one of"),
    "no architecture": (
        lambda file: file.metadata.pop("general.architecture") and None,
        "general.architecture is None",
    ),
    "layers that are a text": (_metadata(llama__block_count="two"), "llama.block_count is 'two', expected a whole"),
    "heads by layer": (_metadata(llama__attention__head_count=[4, 2]), "the same for every layer"),
    "experts": (_metadata(llama__expert_count=8), "llama.expert_count is 8, which no family that is read has"),
    "an unknown RoPE": (_metadata(llama__rope__scaling__type="longrope"), "rope.scaling.type 'longrope'"),
    "no Llama 3": (_tensor("rope_freqs.weight", f32(np.array([1, 9, 2, 3, 1, 5, 1, 4.0], np.float32))), "no RoPE of"),
    "half of RoPE": (_metadata(llama__rope__dimension_count=8), "partial_rotary_factor"),
    "no tokenizer": (_metadata(tokenizer__ggml__model="none"), "tokenizer.ggml.model 'none' is not rebuilt"),
    "another tokenizer": (_metadata(tokenizer__ggml__model="t5"), "'t5' is not rebuilt, expected one of gpt2, llama"),
    "an unknown pre-tokenizer": (_metadata(tokenizer__ggml__pre="x"), "tokenizer.ggml.pre 'x' is not known"),
    "kinds of too few tokens": (_metadata(tokenizer__ggml__token_type=[1]), "tokens and the kinds of 1"),
    "merges of what is no token": (
        _metadata(tokenizer__ggml__merges=["zz zz"]),
        "tokenizer.ggml.merges holds none, or",
    ),
    "a token twice": (_metadata(tokenizer__ggml__tokens=["a"] * 96), "the token 'a' stands twice"),
    "an end that is no token": (_metadata(tokenizer__ggml__eos_token_id=5000), "model.gguf"),
}


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("Llama", {}, folder)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_one_line(name: str, small_llama: Path, tmp_path: Path) -> None:
    change, said = BAD[name]
    file = from_checkpoint(small_llama)
    change(file)
    path = file.write(tmp_path / "model.gguf")
    _refused(path, said, tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_anywhere_is_refused_with_one_line(share: float, small_llama: Path, tmp_path: Path) -> None:
    path = from_checkpoint(small_llama).write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    _refused(path, "model.gguf", tmp_path)


def test_not_a_file_at_all(tmp_path: Path) -> None:
    _refused(tmp_path / "model.gguf", "model.gguf is missing", tmp_path)
    (tmp_path / "model.gguf").mkdir()
    _refused(tmp_path / "model.gguf", "is no regular file", tmp_path)
    (tmp_path / "model.gguf").rmdir()
    (tmp_path / "model.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    _refused(tmp_path / "model.gguf", "git-lfs pointer", tmp_path)


def _refused(path: Path, said: str, folder: Path) -> None:
    before = sorted(folder.iterdir())
    done = called("export", "cpu", "--checkpoint", str(path), "--out", str(folder / "b"), "--no-validate")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr and len(done.stderr) < 600
    assert sorted(folder.iterdir()) == before


def test_what_takes_back_yarns_own_factor_is_left_out_as_transformers_does(tmp_path: Path) -> None:
    make_checkpoint(*CASES["qwen3-yarn"], tmp_path)
    file = from_checkpoint(tmp_path)
    file.metadata["qwen3.rope.scaling.attn_factor"] = 1 / (0.1 * np.log(4.0).item() + 1)
    assert open_checkpoint(file.write(tmp_path / "a.gguf")).config.rope.attention_factor is None
    file.metadata["qwen3.rope.scaling.attn_factor"] = 1.5
    assert open_checkpoint(file.write(tmp_path / "b.gguf")).config.rope.attention_factor == 1.5


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    make_checkpoint("Llama", {}, tmp_path)
    file = from_checkpoint(tmp_path)
    file.metadata["llama.expert_count"] = 8
    with pytest.raises(UnsupportedError):
        open_checkpoint(file.write(tmp_path / "m.gguf"))
