"""The streaming pass: the same bytes whatever the chunks, resumed or not, and a hash that is the file's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.packing import byte_ranges, journaled
from tests.sources import Watched
from toolkit.checkpoint.config import read_config
from toolkit.checkpoint.opened import open_checkpoint
from toolkit.checkpoint.synthetic import SyntheticWeights
from toolkit.checkpoint.weights import WeightSource
from toolkit.errors import NonFiniteError
from toolkit.graph.layout import Layout, Unit, plan_layout
from toolkit.partition import pack, prefix_hash
from toolkit.partition.data_files import Destination
from toolkit.partition.pack import PackResult, pack_weights
from toolkit.partition.prefix_hash import PrefixHash
from toolkit.quant.blockwise import QuantSpec, quantize_blocks
from toolkit.recipe import QuantRule, Recipe
from toolkit.target import TARGETS

RULES = (
    QuantRule("lm_head", "kquant", 8, 128),
    QuantRule("*.o_proj", "rtn", 4, 16, symmetric=True),
    # Of another spec than q and k, so that layer 0 keeps three matrices where the others stack them.
    QuantRule("model.layers.0.self_attn.v_proj", "rtn", 8, 32),
    QuantRule("*", "kquant", 4, 32),
)
RECIPES: dict[str, Recipe | None] = {
    "fp32": None,
    "quantized": Recipe("pack-cpu", "pack", "cpu", 128, RULES, {}, quality="fast"),
}


@pytest.fixture(params=["stored", "synthetic"])
def source(request: pytest.FixtureRequest, stories260k: Path) -> WeightSource:
    """An fp32 checkpoint, whose rows are views of memory that scans use again, and one that is made as it is read."""
    if request.param == "stored":
        return open_checkpoint(stories260k).source
    return SyntheticWeights(read_config(stories260k))


@pytest.fixture(params=RECIPES)
def layout(request: pytest.FixtureRequest, stories260k: Path) -> Layout:
    return plan_layout(read_config(stories260k), TARGETS["cpu"], RECIPES[request.param])


def _pack(source: WeightSource, layout: Layout, folder: Path) -> PackResult:
    return pack_weights(source, [Destination(layout, folder)])[0]


def _bytes(folder: Path) -> bytes:
    return (folder / "model.onnx.data").read_bytes()


def _expected(source: WeightSource, layout: Layout) -> bytes:
    """The data file made in memory, a whole unit at a time, from `read`."""
    data = bytearray(layout.nbytes)
    for unit in layout.units.values():
        values = np.concatenate([source.read(name) for name in unit.sources])
        arrays: list[NDArray[Any]] = [values]
        if unit.spec:
            blocks = quantize_blocks(values, unit.spec)
            arrays = [blocks.packed, blocks.scales.astype(ml_dtypes.bfloat16)]
            if blocks.zero_points is not None:
                arrays.append(blocks.zero_points)
        for slot, array in zip(unit.slots, arrays, strict=True):
            assert (str(array.dtype), array.shape, array.nbytes) == (slot.dtype, slot.shape, slot.nbytes)
            data[slot.offset : slot.offset + slot.nbytes] = array.tobytes()
    return bytes(data)


def test_some_units_stack_and_some_do_not(stories260k: Path) -> None:
    """What RULES is for."""
    layout = plan_layout(read_config(stories260k), TARGETS["cpu"], RECIPES["quantized"])
    assert {len(unit.sources) for unit in layout.units.values()} == {1, 3}


@pytest.mark.parametrize("chunk_bytes", [1000, 1 << 20])
def test_bytes_and_hash_do_not_depend_on_chunks(
    source: WeightSource, layout: Layout, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "CHUNK_BYTES", chunk_bytes)
    finished: list[str] = []
    result = pack_weights(source, [Destination(layout, tmp_path)], finished.append)[0]
    data = _bytes(tmp_path)
    assert data == _expected(source, layout)
    assert result.sha256["model.onnx.data"] == hashlib.sha256(data).hexdigest()
    tensors = sorted(name for unit in layout.units.values() for name in unit.sources)
    assert sorted(finished) == sorted(journaled(tmp_path)) == sorted(e.tensor for e in result.errors) == tensors
    for error in result.errors:
        values = source.read(error.tensor).astype(np.float64)
        assert error.signal == pytest.approx(float((values**2).sum()), rel=1e-4)


@pytest.mark.parametrize("keep_cached", [True, False])
def test_resuming_decodes_only_what_the_journal_does_not_name(
    source: WeightSource, layout: Layout, keep_cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "fits_the_page_cache", lambda nbytes: keep_cached)
    whole = _pack(source, layout, tmp_path)
    data = _bytes(tmp_path)
    head, *lines = (tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))[::2]]
    (tmp_path / "journal.jsonl").write_text(head + "".join(kept) + lines[0][:20], encoding="utf-8")
    done = {json.loads(line)["tensor"] for line in kept}
    left = {name for unit in layout.units.values() for name in unit.sources} - done
    with (tmp_path / "model.onnx.data").open("r+b") as file:
        for begin, end in (place for name in left for place in byte_ranges(layout, name)):
            file.seek(begin)
            file.write(b"\xa5" * (end - begin))
    watched = Watched(source)
    again = _pack(watched, layout, tmp_path)
    assert watched.decoded == left
    assert _bytes(tmp_path) == data
    assert again.sha256 == whole.sha256 == {"model.onnx.data": hashlib.sha256(data).hexdigest()}
    # Rows of one tensor may be added up in another order.
    first, second = ({e.tensor: (e.signal, e.noise) for e in result.errors} for result in (whole, again))
    assert first.keys() == second.keys()
    assert all(second[name] == pytest.approx(first[name], rel=1e-9) for name in first)


def test_a_whole_journal_leaves_only_the_hash_to_do(source: WeightSource, layout: Layout, tmp_path: Path) -> None:
    whole = _pack(source, layout, tmp_path)
    watched = Watched(source)
    assert _pack(watched, layout, tmp_path) == whole
    assert not watched.decoded


@pytest.mark.parametrize("commit_bytes", [1, 1 << 28], ids=["commits often", "commits at the end"])
@pytest.mark.parametrize("broken", ["model.embed_tokens.weight", "model.layers.2.self_attn.k_proj.weight", "last"])
def test_an_error_leaves_a_journal_of_whole_tensors(
    source: WeightSource,
    layout: Layout,
    broken: str,
    commit_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At most five chunks in the window, so that tensors before the broken one are through by then.
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr(pack, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(pack, "_COMMIT_BYTES", commit_bytes)
    expected = _expected(source, layout)
    broken = source.names()[-1] if broken == "last" else broken
    with pytest.raises(NonFiniteError, match=broken):
        _pack(Watched(source, broken), layout, tmp_path)
    data, named = _bytes(tmp_path), journaled(tmp_path)
    assert len(data) == layout.nbytes and broken not in named and len(named) == len(set(named))
    assert named or source.names().index(broken) < 10
    for name in named:
        for begin, end in byte_ranges(layout, name):
            assert data[begin:end] == expected[begin:end]
    watched = Watched(source)
    assert _pack(watched, layout, tmp_path).sha256 == {"model.onnx.data": hashlib.sha256(expected).hexdigest()}
    assert _bytes(tmp_path) == expected
    assert watched.decoded.isdisjoint(named)


def _fill(path: Path, unit: Unit, rng: np.random.Generator) -> None:
    with path.open("r+b") as file:
        for slot in unit.slots:
            file.seek(slot.offset)
            file.write(rng.bytes(slot.nbytes))


@pytest.mark.parametrize("keep_cached", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_prefix_hash_of_tensors_in_any_order(
    layout: Layout, seed: int, keep_cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_hash, "_READ_BYTES", 10_007)
    path = tmp_path / "model.onnx.data"
    path.write_bytes(bytes(layout.nbytes))
    rng = np.random.default_rng(seed)
    tensors = [name for unit in layout.units.values() for name in unit.sources]
    order = [tensors[i] for i in rng.permutation(len(tensors))]
    # Seed 0 goes in file order, where every call finds something to hash.
    order = tensors if seed == 0 else order
    units = {name: unit for unit in layout.units.values() for name in unit.sources}
    missing = {unit.name: set(unit.sources) for unit in layout.units.values()}
    running = PrefixHash(layout.units.values(), layout.nbytes, path, keep_cached)
    while order:
        batch, order = order[:3], order[3:]
        for name in batch:
            missing[units[name].name].discard(name)
            # Bytes come as late as they may: what is hashed too early is hashed as zeros.
            if not missing[units[name].name]:
                _fill(path, units[name], rng)
        running.finish(batch)
    assert running.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_journal_whose_data_file_is_gone_names_nothing(source: WeightSource, layout: Layout, tmp_path: Path) -> None:
    whole = _pack(source, layout, tmp_path)
    expected = _bytes(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    broken = next(iter(layout.units.values())).sources[0]
    with pytest.raises(NonFiniteError):
        _pack(Watched(source, broken), layout, tmp_path)
    assert _pack(source, layout, tmp_path).sha256 == whole.sha256
    assert _bytes(tmp_path) == expected


def test_a_journal_of_another_layout_names_nothing(stories260k: Path, tmp_path: Path) -> None:
    source, config = open_checkpoint(stories260k).source, read_config(stories260k)
    wide, narrow = (QuantSpec(bits, short_scales=True) for bits in (8, 4))
    one, other = (f"model.layers.{k}.mlp.down_proj.weight" for k in (1, 2))
    recipe = RECIPES["quantized"]
    formats = ({one: wide, other: narrow}, {one: narrow, other: wide})
    layouts = [plan_layout(config, TARGETS["cpu"], recipe, chosen) for chosen in formats]
    assert layouts[0].files == layouts[1].files
    _pack(source, layouts[0], tmp_path)
    watched = Watched(source)
    _pack(watched, layouts[1], tmp_path)
    assert watched.decoded == set(source.names())
    assert _bytes(tmp_path) == _expected(source, layouts[1])
