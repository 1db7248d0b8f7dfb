"""What is read of a checkpoint against torch and hashlib: every form of config, dtype, shard, chunk and read."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.random_models import LLAMA3, YARN, make_checkpoint
from toolkit.checkpoint import scan
from toolkit.checkpoint.config import ModelConfig, parse_config, read_config
from toolkit.checkpoint.rope_config import RopeConfig
from toolkit.checkpoint.safetensors import read_header
from toolkit.checkpoint.scan import ReadBytes, Rows, scan_file
from toolkit.checkpoint.synthetic import SyntheticWeights
from toolkit.checkpoint.weights import Origin, WeightSource, check_finite, expected_tensors, open_weights
from toolkit.errors import NonFiniteError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
YARN_IN_FULL = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.5,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "truncate": False,
}
ROPES: dict[str, tuple[dict[str, Any] | None, RopeConfig]] = {
    "default": (None, RopeConfig("default", 5e5)),
    "linear": ({"rope_type": "linear", "factor": 2.0}, RopeConfig("linear", 5e5, 2.0)),
    "llama3": (LLAMA3, RopeConfig("llama3", 5e5, 8.0, 16, low_freq_factor=1.0, high_freq_factor=4.0)),
    "yarn": (YARN, RopeConfig("yarn", 5e5, 4.0, 16)),
    "yarn in full": (
        YARN_IN_FULL,
        RopeConfig(
            "yarn",
            5e5,
            4.0,
            16,
            attention_factor=1.5,
            beta_fast=24.0,
            beta_slow=2.0,
            mscale=0.7,
            mscale_all_dim=0.9,
            truncate=False,
        ),
    ),
}
STORED = ("bf16", "fp16", "fp32", "mixed", "odd header", "bf16 shards", "fp32 shards")
CHUNKS = (1000, 4097, 1 << 20)


def _parse(changes: dict[str, Any]) -> ModelConfig:
    return parse_config(LLAMA | changes, Path("config.json"))


@pytest.mark.parametrize("rope", ROPES)
def test_configs_of_transformers_4_and_5_are_equal(rope: str) -> None:
    scaling, expected = ROPES[rope]
    old = _parse({"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "bfloat16"})
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": 5e5}
    assert old == _parse({"rope_parameters": parameters, "dtype": "bfloat16"})
    assert old.rope == expected
    if scaling:
        # Before transformers 4.43 the key was `type`.
        elder = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
        assert old == _parse({"rope_theta": 5e5, "rope_scaling": elder, "torch_dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("rope", "positions", "longest"),
    [
        ("default", 64, 64),
        ("linear", 64, 64),
        # Qwen3's model card: four times 32,768 tokens, and max_position_embeddings stays.
        ("yarn", 40, 64),
        ("yarn", 128, 128),
    ],
)
def test_yarn_reads_factor_times_the_original_length(rope: str, positions: int, longest: int) -> None:
    scaling, _ = ROPES[rope]
    assert _parse({"rope_scaling": scaling, "max_position_embeddings": positions}).longest_context == longest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A random Qwen2 with numbers that are easily lost: a negative zero, subnormals, fp16's largest."""
    made = make_checkpoint("Qwen2", {}, tmp_path_factory.mktemp("qwen2"))
    made.get_parameter("model.embed_tokens.weight").data[5, :4] = torch.tensor([-0.0, 6e-8, 1e-40, 65504.0])
    return made


def _store(model: PreTrainedModel, form: str, folder: Path) -> dict[str, torch.Tensor]:
    """Saves the model in a form of STORED; returns its tensors as they were saved."""
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(form.split()[0], torch.bfloat16)
    saved = copy.deepcopy(model)
    torch.nn.Module.to(saved, dtype)
    tensors = dict(saved.state_dict())
    saved.config.save_pretrained(folder)
    if form.endswith("shards"):
        saved.save_pretrained(folder, max_shard_size="60KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        return tensors
    if form == "mixed":
        tensors |= {name: tensor.float() for name, tensor in model.state_dict().items() if "norm" in name}
    path = folder / "model.safetensors"
    save_file(tensors, path)
    if form == "odd header":
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        # JSON may end in blanks, and then no tensor is aligned.
        path.write_bytes(struct.pack("<Q", length + 3) + data[8 : 8 + length] + b"   " + data[8 + length :])
    return tensors


def _assert_same_bits(values: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Equal, and a negative zero is one."""
    assert values.shape == expected.shape and values.dtype == np.float32
    np.testing.assert_array_equal(np.ascontiguousarray(values).view(np.uint32), expected.view(np.uint32))


def _reassemble(
    source: WeightSource, shapes: Mapping[str, tuple[int, ...]], chunk_bytes: int
) -> dict[str, NDArray[np.float32]]:
    """Every tensor from `scan` and `decode`, each chunk decoded in two parts; no row may come twice or never."""
    whole = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    seen = {name: np.zeros(shape[0], int) for name, shape in shapes.items()}
    for rows in source.scan(chunk_bytes):
        middle = (rows.start + rows.stop) // 2
        for start, stop in ((rows.start, middle), (middle, rows.stop)):
            if start < stop:
                whole[rows.name][start:stop] = source.decode(rows, start, stop)
        seen[rows.name][rows.start : rows.stop] += 1
        rows.release()
    assert all((count == 1).all() for count in seen.values())
    return whole


@pytest.mark.parametrize("form", STORED)
def test_every_read_equals_torch(form: str, model: PreTrainedModel, tmp_path: Path) -> None:
    oracle = {name: tensor.float().numpy() for name, tensor in _store(model, form, tmp_path).items()}
    source = open_weights(tmp_path, read_config(tmp_path))
    assert sorted(source.names()) == sorted(oracle)
    rng = np.random.default_rng(0)
    for name, expected in oracle.items():
        _assert_same_bits(source.read(name), expected)
        start, stop = sorted(int(i) for i in rng.choice(len(expected) + 1, 2, replace=False))
        _assert_same_bits(source.read_rows(name, start, stop), expected[start:stop])
    for chunk_bytes in CHUNKS:
        scanned = _reassemble(source, {name: array.shape for name, array in oracle.items()}, chunk_bytes)
        for name, expected in oracle.items():
            _assert_same_bits(scanned[name], expected)


@pytest.fixture(scope="module")
def with_extras(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 checkpoint, tied, with tensors that its config ignores at its beginning, inside and at its end."""
    folder = tmp_path_factory.mktemp("extras")
    tensors = _store(model, "fp32", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    inside, end = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"
    save_file({**tensors, inside: torch.rand(8), end: torch.rand(2003)}, folder / "model.safetensors")
    in_order = sorted((refs := read_header(folder / "model.safetensors")), key=lambda name: refs[name].offset)
    assert in_order[0] == "lm_head.weight" and inside in in_order[1:-1] and in_order[-1] == end
    return folder


@pytest.fixture(scope="module")
def in_shards(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    _store(model, "bf16 shards", folder)
    return folder


@pytest.fixture(params=["with_extras", "in_shards"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each of the two checkpoints that scans are tried on."""
    found: Path = request.getfixturevalue(request.param)
    return found


def _scans(folder: Path, chunk_bytes: int, direct: bool, digests: dict[str, str]) -> Iterator[tuple[Rows, bytes]]:
    """Rows of every file in turn, each with what the file holds at its place."""
    source = open_weights(folder, read_config(folder))
    for path in source.files():
        refs = {name: ref for name, ref in read_header(path).items() if name in source.names()}
        data = path.read_bytes()
        for rows in scan_file(path, list(refs.values()), chunk_bytes, direct, digests, ReadBytes()):
            ref = refs[rows.name]
            row_bytes = ref.nbytes // ref.shape[0]
            yield rows, data[ref.offset + rows.start * row_bytes : ref.offset + rows.stop * row_bytes]


def _sha256(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_digests_are_of_whole_files(folder: Path, direct: bool, chunk_bytes: int) -> None:
    digests: dict[str, str] = {}
    for rows, expected in _scans(folder, chunk_bytes, direct, digests):
        assert rows.raw is not None and rows.raw.tobytes() == expected
        rows.release()
    assert digests == _sha256(folder)


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_a_source_knows_its_digests_after_a_scan(folder: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.checkpoint.weights.fits_the_page_cache", lambda nbytes: not direct)
    source = open_weights(folder, read_config(folder))
    for rows in source.scan(4097):
        rows.release()
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    expected = [Origin(name, sizes[name], sha) for name, sha in sorted(_sha256(folder).items())]
    assert source.digests() == tuple(expected)


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("release", ["never", "at once", "late and out of order", "on other threads"])
def test_when_rows_are_released_does_not_matter(folder: Path, release: str, direct: bool) -> None:
    digests: dict[str, str] = {}
    held: deque[tuple[Rows, bytes]] = deque()
    rng = np.random.default_rng(0)

    def check_and_release(rows: Rows, expected: bytes) -> None:
        assert rows.raw is not None and rows.raw.tobytes() == expected
        rows.release()

    with ThreadPoolExecutor(3) as pool:
        for rows, expected in _scans(folder, 1000, direct, digests):
            if release == "at once":
                check_and_release(rows, expected)
            elif release == "on other threads":
                held.append((rows, expected))
                if len(held) == 12:
                    list(pool.map(lambda pair: check_and_release(*pair), held))
                    held.clear()
            else:
                held.append((rows, expected))
                if release != "never" and len(held) == 12:
                    held.rotate(int(rng.integers(12)))
                    check_and_release(*held.popleft())
    for rows, expected in held:
        check_and_release(rows, expected)
    assert digests == _sha256(folder)


def test_memory_is_not_used_again_before_it_is_hashed(in_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """Hashes so late that rows read next would be hashed in place of these."""

        def __init__(self) -> None:
            self._sha = hashlib.sha256()

        def update(self, data: memoryview) -> None:
            time.sleep(0.003)
            self._sha.update(data)

        def hexdigest(self) -> str:
            return self._sha.hexdigest()

    monkeypatch.setattr(scan, "hashlib", SimpleNamespace(sha256=Slow))
    digests: dict[str, str] = {}
    for rows, expected in _scans(in_shards, 4097, False, digests):
        assert rows.raw is not None and rows.raw.tobytes() == expected
        rows.release()
    assert digests == _sha256(in_shards)


def _synthetic_config() -> ModelConfig:
    # An embedding longer than the table of random numbers, which then has to start over inside it.
    return _parse({"vocab_size": 66_000})


def test_synthetic_rows_do_not_depend_on_how_they_are_asked() -> None:
    config = _synthetic_config()
    source, shapes = SyntheticWeights(config), expected_tensors(config)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        whole = source.read(name)
        assert whole.shape == shape and np.isfinite(whole).all()
        cuts = sorted({0, shape[0], *(int(i) for i in rng.integers(0, shape[0], 40))})
        parts = [source.read_rows(name, start, stop) for start, stop in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        for row in rng.integers(0, shape[0], 20):
            np.testing.assert_array_equal(source.read_rows(name, row, row + 1), whole[row : row + 1])
    assert source.read("model.embed_tokens.weight").std() == pytest.approx(0.02, rel=0.02)


def test_synthetic_weights_depend_on_the_seed_alone() -> None:
    config = _synthetic_config()
    one, same, other = SyntheticWeights(config), SyntheticWeights(config), SyntheticWeights(config, seed=1)
    for name in one.names():
        np.testing.assert_array_equal(one.read(name), same.read(name))
        # Gains are 1 whatever the seed.
        assert name.endswith("norm.weight") or (one.read(name) != other.read(name)).mean() > 0.99
    assert one.identity() == same.identity() != other.identity()


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_synthetic_scan_covers_each_row_once(chunk_bytes: int) -> None:
    config = _synthetic_config()
    source = SyntheticWeights(config)
    for name, values in _reassemble(source, expected_tensors(config), chunk_bytes).items():
        np.testing.assert_array_equal(values, source.read(name))


def test_a_shard_of_nothing_but_computed_tensors_is_hashed_too(stories260k: Path, tmp_path: Path) -> None:
    for path in stories260k.glob("*.json"):
        shutil.copy(path, tmp_path)
    shutil.copy(stories260k / "model.safetensors", tmp_path / "a.safetensors")
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "b.safetensors")
    weight_map = dict.fromkeys(read_header(tmp_path / "a.safetensors"), "a.safetensors")
    weight_map["model.layers.0.self_attn.rotary_emb.inv_freq"] = "b.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    source = open_weights(tmp_path, read_config(tmp_path))
    for rows in source.scan(1 << 20):
        rows.release()
    expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.glob("*.safetensors")}
    assert {entry.name: entry.sha256 for entry in source.digests()} == expected


@pytest.mark.parametrize(
    ("value", "said"), [(np.inf, "1 NaN or infinite"), (np.nan, "1 NaN"), (6e28, "up to 6e\\+28, whose")]
)
def test_weights_that_no_arithmetic_survives_are_named(value: float, said: str) -> None:
    values = np.ones((2, 3), np.float32)
    values[1, 1] = -value
    with pytest.raises(NonFiniteError, match=f"x.weight holds .*{said}"):
        check_finite(values, "x.weight")
    check_finite(np.full((2, 3), 1e18, np.float32), "x.weight")
