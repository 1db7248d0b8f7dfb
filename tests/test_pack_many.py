"""Many bundles from one pass: each as if it were alone, equal files once on the disk, and no finished one touched."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.command_line import called
from tests.graphs import CONTEXT_LENGTH, EIGHT_BITS, WINDOW, export_bundle
from tests.packing import byte_ranges, journaled
from tests.sources import Watched
from toolkit.bundle.manifest import verify_manifest
from toolkit.checkpoint.opened import Checkpoint, open_checkpoint
from toolkit.checkpoint.padded_heads import pad_heads
from toolkit.checkpoint.scan import Rows
from toolkit.errors import MachineError, NonFiniteError, UnsupportedError
from toolkit.graph.attention import HEAD_DIM_MULTIPLE
from toolkit.graph.layout import Layout, Slot, plan_layout
from toolkit.partition import pack, rows
from toolkit.partition.data_files import Destination
from toolkit.partition.pack import pack_weights
from toolkit.pipeline import export, plan
from toolkit.pipeline.export import Order, export_bundles
from toolkit.quant.blockwise import QuantSpec, quantize_blocks
from toolkit.recipe import QuantRule, Recipe, load_recipe
from toolkit.target import TARGETS

MANY = ("cpu", "cpu-split", "dml", "qnn", "openvino")
OUTSIDE = QuantRule("lm_head|model.embed_tokens", "kquant", 4, 32)
# Files as (target, name); what is on a line is one file on the disk.
ONE_FILE_EACH: tuple[set[tuple[str, str]], ...] = (
    {("cpu", "model.onnx.data")},
    {(target, "embeddings.onnx.data") for target in MANY[1:]},
    {(target, "lm_head.onnx.data") for target in MANY[1:]},
    {("cpu-split", "transformer.onnx.data")},
    {("dml", "transformer.onnx.data"), ("qnn", "transformer.onnx.data")},
    {("openvino", "transformer.onnx.data")},
)


def _layout(checkpoint: Checkpoint, target: str) -> Layout:
    """Four bits everywhere, without zero points in openvino's transformer."""
    rules = (OUTSIDE, QuantRule("*", "kquant", 4, 32, symmetric=target == "openvino"))
    window = WINDOW if TARGETS[target].partitioned else 0
    recipe = Recipe(f"r-{target}", "m", target, CONTEXT_LENGTH, rules, {}, window=window, quality="fast")
    return plan_layout(checkpoint.config, TARGETS[target], recipe)


def _destinations(checkpoint: Checkpoint, root: Path, targets: Sequence[str] = MANY) -> list[Destination]:
    made = [Destination(_layout(checkpoint, target), root / target) for target in targets]
    for destination in made:
        destination.folder.mkdir(parents=True, exist_ok=True)
    return made


def _contents(destination: Destination) -> dict[str, bytes]:
    return {name: (destination.folder / name).read_bytes() for name in destination.layout.files}


def _hashes(destination: Destination) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in _contents(destination).items()}


def _scribble(destination: Destination, tensors: set[str]) -> None:
    """Other bytes wherever the tensors lie."""
    for tensor in tensors:
        unit = next(unit for unit in destination.layout.units.values() if tensor in unit.sources)
        with (destination.folder / unit.slots[0].file).open("r+b") as file:
            for begin, end in byte_ranges(destination.layout, tensor):
                file.seek(begin)
                file.write(b"\xa5" * (end - begin))


def _values(destination: Destination, slot: Slot) -> NDArray[Any]:
    raw = (destination.folder / slot.file).read_bytes()[slot.offset : slot.offset + slot.nbytes]
    return np.frombuffer(raw, slot.dtype).reshape(slot.shape)


def _specs(layout: Layout) -> dict[str, QuantSpec | None]:
    return {name: unit.spec for unit in layout.units.values() for name in unit.sources}


def _raise_after(count: int, seen: list[str]) -> Callable[[str], None]:
    """A progress that is interrupted at its `count`th tensor."""

    def progress(name: str) -> None:
        seen.append(name)
        if len(seen) == count:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(params=["tiny_r1", "stories260k"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    """bf16 with an LM head of its own, and fp32 with tied embeddings and heads to be padded."""
    return pad_heads(open_checkpoint(request.getfixturevalue(request.param)), HEAD_DIM_MULTIPLE)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a matrix, and journals written all the time."""
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr(pack, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(pack, "_COMMIT_BYTES", 1)


def test_each_bundle_gets_the_bytes_of_a_pass_of_its_own(
    checkpoint: Checkpoint, small_chunks: None, tmp_path: Path
) -> None:
    together = _destinations(checkpoint, tmp_path / "together")
    results = pack_weights(checkpoint.source, together)
    for destination, result, target in zip(together, results, MANY, strict=True):
        (alone,) = _destinations(checkpoint, tmp_path / "alone", [target])
        (expected,) = pack_weights(checkpoint.source, [alone])
        assert _contents(destination) == _contents(alone), target
        assert result.sha256 == expected.sha256 == _hashes(destination)
        first, second = ({e.tensor: (e.signal, e.noise) for e in made.errors} for made in (expected, result))
        assert first.keys() == second.keys() == set(checkpoint.source.names())
        # Rows of one tensor may be added up in another order.
        assert all(second[name] == pytest.approx(first[name], rel=1e-9) for name in first)


def test_equal_files_are_one_and_others_are_not(checkpoint: Checkpoint, tmp_path: Path) -> None:
    destinations = dict(zip(MANY, _destinations(checkpoint, tmp_path), strict=True))
    pack_weights(checkpoint.source, list(destinations.values()))
    places = {(t, name): d.folder / name for t, d in destinations.items() for name in d.layout.files}
    group = {place: k for k, together in enumerate(ONE_FILE_EACH) for place in together}
    assert places.keys() <= group.keys() and {target for target, _ in places} == set(MANY)
    for one, other in itertools.combinations(places, 2):
        assert os.path.samefile(places[one], places[other]) == (group[one] == group[other]), (one, other)


def test_each_row_is_decoded_once_and_quantized_once_for_each_format(
    checkpoint: Checkpoint, small_chunks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[str, int]] = []
    quantized: list[tuple[QuantSpec, int]] = []
    source, decode = checkpoint.source, checkpoint.source.decode

    def noting_decode(of: Rows, start: int, stop: int) -> NDArray[np.float32]:
        decoded.extend((of.name, row) for row in range(start, stop))
        return decode(of, start, stop)

    def noting_quantize(values: NDArray[np.float32], spec: QuantSpec, importance: None) -> object:
        quantized.append((spec, values.shape[0]))
        return quantize_blocks(values, spec, importance)

    monkeypatch.setattr(source, "decode", noting_decode)
    monkeypatch.setattr(rows, "quantize_blocks", noting_quantize)
    destinations = _destinations(checkpoint, tmp_path)
    pack_weights(source, destinations)
    units = destinations[0].layout.units.values()
    counts = {name: n for unit in units for name, n in zip(unit.sources, unit.rows, strict=True)}
    assert sorted(decoded) == sorted((name, row) for name, n in counts.items() for row in range(n))
    expected: Counter[QuantSpec] = Counter()
    for name, n in counts.items():
        expected.update({spec: n for spec in {_specs(d.layout)[name] for d in destinations} if spec})
    made: Counter[QuantSpec] = Counter()
    for spec, n in quantized:
        made[spec] += n
    # In wide blocks with and without zero points, and the CPU's with their short scales.
    assert made == expected and len(made) == 3


def test_errors_are_those_of_each_bundles_own_format(checkpoint: Checkpoint, tmp_path: Path) -> None:
    destinations = _destinations(checkpoint, tmp_path, ["qnn", "openvino", "cpu"])
    results = pack_weights(checkpoint.source, destinations)
    noises = [{e.tensor: e.noise for e in result.errors} for result in results]
    for destination, noise in zip(destinations, noises, strict=True):
        for name, spec in _specs(destination.layout).items():
            expected = quantize_blocks(checkpoint.source.read(name), spec).noise if spec else 0.0
            assert noise[name] == pytest.approx(expected, rel=1e-6), name
    qnn, openvino, cpu = noises
    inside = {n for n, spec in _specs(destinations[1].layout).items() if spec and spec.symmetric}
    # A zero point more is an error less; elsewhere the formats agree.
    assert inside and all(qnn[name] < openvino[name] for name in inside)
    outside = qnn.keys() - inside
    assert all(qnn[name] == openvino[name] == cpu[name] for name in outside)
    # Scales of 16 bits cost next to nothing.
    assert all(cpu[name] == pytest.approx(qnn[name], rel=0.02) for name in inside)
    assert any(cpu[name] != qnn[name] for name in inside)


def test_half_precision_is_what_single_precision_rounds_to(checkpoint: Checkpoint, tmp_path: Path) -> None:
    half, single = _destinations(checkpoint, tmp_path, ["qnn", "vitisai"])
    pack_weights(checkpoint.source, [half, single])
    assert half.layout.units.keys() == single.layout.units.keys()
    dtypes: Counter[tuple[str, str]] = Counter()
    for name, unit in half.layout.units.items():
        for slot, wide in zip(unit.slots, single.layout.units[name].slots, strict=True):
            dtypes[slot.dtype, wide.dtype] += 1
            expected = _values(single, wide).astype(slot.dtype)
            assert np.array_equal(_values(half, slot), expected), slot.name
    assert dtypes["float16", "float32"] > 20 and dtypes.keys() == {
        ("float16", "float32"),
        ("bfloat16", "bfloat16"),
        ("uint8", "uint8"),
    }


@pytest.mark.parametrize("links", [True, False], ids=["linked", "without links"])
def test_what_any_journal_lacks_is_done_again_everywhere(
    checkpoint: Checkpoint, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    destinations = _destinations(checkpoint, tmp_path)
    first = pack_weights(checkpoint.source, destinations)
    before = [_contents(destination) for destination in destinations]
    left: set[str] = set()
    for k in (0, 3):
        head, *lines = destinations[k].journal.read_text(encoding="utf-8").splitlines(keepends=True)
        lost = set(np.random.default_rng(k).permutation(len(lines))[:5])
        left |= {json.loads(lines[i])["tensor"] for i in lost}
        kept = head + "".join(line for i, line in enumerate(lines) if i not in lost)
        destinations[k].journal.write_text(kept, encoding="utf-8")
    for destination in destinations:
        _scribble(destination, left)
    watched = Watched(checkpoint.source)
    again = pack_weights(watched, destinations)
    assert watched.decoded == left and 5 < len(left) < len(checkpoint.source.names())
    assert [_contents(destination) for destination in destinations] == before
    assert [result.sha256 for result in again] == [result.sha256 for result in first]
    for destination, one, other in zip(destinations, first, again, strict=True):
        assert sorted(journaled(destination.folder)) == sorted(checkpoint.source.names())
        noise = {e.tensor: e.noise for e in one.errors}
        assert {e.tensor: e.noise for e in other.errors} == pytest.approx(noise, rel=1e-9)


@pytest.mark.parametrize("order", [("qnn", "dml", "openvino"), ("openvino", "dml", "qnn")])
def test_one_that_was_whole_before_does_not_excuse_a_fresh_one(
    checkpoint: Checkpoint, order: tuple[str, ...], tmp_path: Path
) -> None:
    pack_weights(checkpoint.source, _destinations(checkpoint, tmp_path / "made", ["qnn"]))
    expected = _destinations(checkpoint, tmp_path / "expected", order)
    pack_weights(checkpoint.source, expected)
    destinations = _destinations(checkpoint, tmp_path / "made", order)
    watched = Watched(checkpoint.source)
    results = pack_weights(watched, destinations)
    assert watched.decoded == set(checkpoint.source.names())
    for destination, other, result in zip(destinations, expected, results, strict=True):
        assert _contents(destination) == _contents(other)
        assert result.sha256 == _hashes(other)


def test_bundles_made_apart_need_only_hashing_together(checkpoint: Checkpoint, tmp_path: Path) -> None:
    destinations = _destinations(checkpoint, tmp_path)
    apart = [pack_weights(checkpoint.source, [destination])[0] for destination in destinations]
    before = [_contents(destination) for destination in destinations]
    watched = Watched(checkpoint.source)
    assert [result.sha256 for result in pack_weights(watched, destinations)] == [result.sha256 for result in apart]
    assert not watched.decoded and [_contents(destination) for destination in destinations] == before
    one, other = (destinations[k].folder / "transformer.onnx.data" for k in (2, 3))
    assert os.path.samefile(one, other)


@pytest.mark.parametrize("damage", ["gone", "cut"])
@pytest.mark.parametrize("name", ["embeddings.onnx.data", "transformer.onnx.data"])
@pytest.mark.parametrize("k", [0, 2])
def test_a_journal_that_speaks_of_a_missing_file_is_not_believed(
    checkpoint: Checkpoint, k: int, name: str, damage: str, tmp_path: Path
) -> None:
    destinations = _destinations(checkpoint, tmp_path, ["cpu-split", "dml", "openvino"])
    pack_weights(checkpoint.source, destinations)
    before = [_contents(destination) for destination in destinations]
    path = destinations[k].folder / name
    data = path.read_bytes()
    # Not in place, which would cut the file of the others too.
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-1])
    watched = Watched(checkpoint.source)
    results = pack_weights(watched, destinations)
    assert watched.decoded == set(checkpoint.source.names())
    assert [_contents(destination) for destination in destinations] == before
    assert [result.sha256 for result in results] == [_hashes(destination) for destination in destinations]


@pytest.mark.parametrize("targets", [("dml", "qnn"), ("openvino", "cpu-split")], ids=["same bytes", "other bytes"])
def test_a_file_shared_with_a_finished_bundle_is_left_alone(
    checkpoint: Checkpoint, targets: tuple[str, ...], small_chunks: None, tmp_path: Path
) -> None:
    (finished,) = _destinations(checkpoint, tmp_path / "finished", ["qnn"])
    pack_weights(checkpoint.source, [finished])
    finished.journal.unlink()
    before = _contents(finished)
    destinations = _destinations(checkpoint, tmp_path / "anew", targets)
    for destination, name in itertools.product(destinations, finished.layout.files):
        os.link(finished.folder / name, destination.folder / name)
    broken = checkpoint.source.names()[-3]
    with pytest.raises(NonFiniteError, match=broken):
        pack_weights(Watched(checkpoint.source, broken), destinations)
    assert _contents(finished) == before
    # As far as the failed pass came, it wrote: otherwise there was nothing to leave alone.
    assert all(0 < len(journaled(d.folder)) < len(checkpoint.source.names()) for d in destinations)
    pack_weights(checkpoint.source, destinations)
    assert _contents(finished) == before
    for destination in destinations:
        assert not any(os.path.samefile(finished.folder / n, destination.folder / n) for n in finished.layout.files)


def _no_links(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def test_without_hard_links_there_are_as_many_files_of_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = _destinations(checkpoint, tmp_path / "linked")
    pack_weights(checkpoint.source, linked)
    monkeypatch.setattr(os, "link", _no_links)
    apart = _destinations(checkpoint, tmp_path / "apart")
    results = pack_weights(checkpoint.source, apart)
    for destination, other, result in zip(apart, linked, results, strict=True):
        assert _contents(destination) == _contents(other)
        assert result.sha256 == _hashes(destination)
        assert {(destination.folder / name).stat().st_nlink for name in destination.layout.files} == {1}
        assert {path.name for path in destination.folder.iterdir()} == {*destination.layout.files, "journal.jsonl"}


# A gain that is kept, a matrix whose scales grow, a bias; then what the CPU computes in float32 on every target.
@pytest.mark.parametrize(
    ("tensor", "factor", "half_refuses"),
    [
        ("model.layers.1.input_layernorm.weight", 1e6, True),
        ("model.layers.0.mlp.down_proj.weight", 1e9, True),
        ("model.layers.2.self_attn.k_proj.bias", 1e9, True),
        ("model.embed_tokens.weight", 1e9, False),
        ("lm_head.weight", 1e9, False),
    ],
)
@pytest.mark.parametrize("target", ["cpu", "cpu-split", "vitisai", "dml", "qnn", "openvino"])
def test_values_beyond_half_precision_are_refused_where_they_are_stored_so(
    tiny_r1: Path,
    tensor: str,
    factor: float,
    half_refuses: bool,
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    decode = checkpoint.source.decode

    def growing(of: Rows, start: int, stop: int) -> NDArray[np.float32]:
        return decode(of, start, stop) * np.float32(factor if of.name == tensor else 1)

    monkeypatch.setattr(checkpoint.source, "decode", growing)
    destinations = _destinations(checkpoint, tmp_path, ["cpu", target] if target != "cpu" else ["cpu"])
    if half_refuses and TARGETS[target].form.activations == "float16":
        with pytest.raises(UnsupportedError, match=rf"^{tensor} holds values beyond float16's 65504 .*such as cpu"):
            pack_weights(checkpoint.source, destinations)
        return
    pack_weights(checkpoint.source, destinations)
    unit = next(unit for unit in destinations[-1].layout.units.values() if tensor in unit.sources)
    floats = _values(destinations[-1], next(slot for slot in unit.slots if slot.dtype != "uint8"))
    wide = floats.astype(np.float32)
    assert floats.dtype != np.float16 and np.abs(wide).max() > 65504 and np.isfinite(wide).all()


def _orders(root: Path, *targets: str) -> list[Order]:
    """qnn as it shares its bytes with dml."""
    form = {"qnn": ("profile=float16",)}
    recipes = {target: load_recipe(f"tiny-r1-{target}", [*EIGHT_BITS, *form.get(target, ())]) for target in targets}
    return [Order(recipe, root / target) for target, recipe in recipes.items()]


def _files(bundle: Path) -> dict[str, bytes]:
    """All but the report, which says how long it took."""
    return {p.name: p.read_bytes() for p in bundle.iterdir() if not p.name.startswith("report.")}


def test_two_recipes_give_two_whole_bundles(tiny_r1: Path, tmp_path: Path) -> None:
    bundles = export_bundles(_orders(tmp_path, "dml", "qnn"), open_checkpoint(tiny_r1))
    assert bundles == [tmp_path / "dml", tmp_path / "qnn"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dml", "qnn"]
    for bundle, other in zip(bundles, reversed(bundles), strict=True):
        assert verify_manifest(bundle) == []
        report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
        assert report["conversion"]["in_one_pass_with"] == [f"tiny-r1-{other.name}"]
        (order,) = _orders(tmp_path, bundle.name)
        alone = export_bundle(order.recipe, open_checkpoint(tiny_r1), tmp_path / "alone")
        assert _files(bundle) == _files(alone)
        report = json.loads((alone / "report.json").read_text(encoding="utf-8"))
        assert "in_one_pass_with" not in report["conversion"]
    for name in ("embeddings.onnx.data", "transformer.onnx.data", "lm_head.onnx.data"):
        assert os.path.samefile(bundles[0] / name, bundles[1] / name)


@pytest.fixture(scope="module")
def whole(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three targets made in one pass that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return export_bundles(_orders(folder, "dml", "openvino", "cpu"), open_checkpoint(tiny_r1))


@pytest.mark.parametrize("count", [1, 5, 30])
def test_interrupted_pass_goes_on_to_the_same_bundles(
    tiny_r1: Path, whole: list[Path], count: int, small_chunks: None, tmp_path: Path
) -> None:
    targets = [bundle.name for bundle in whole]
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        export_bundles(
            _orders(tmp_path / "made", *targets), open_checkpoint(tiny_r1), progress=_raise_after(count, seen)
        )
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == sorted(f"{t}.partial" for t in targets)
    later: list[str] = []
    made = export_bundles(_orders(tmp_path / "made", *targets), open_checkpoint(tiny_r1), progress=later.append)
    names = open_checkpoint(tiny_r1).source.names()
    assert {*seen, *later} == set(names) and not set(seen) & set(later)
    for bundle, other in zip(made, whole, strict=True):
        assert verify_manifest(bundle) == []
        assert _files(bundle) == _files(other)


def test_killed_between_two_bundles_the_finished_one_stays_whole(
    tiny_r1: Path, small_chunks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shares its data files with the work folder of the other, which the next run packs anew."""
    orders, replace, calls = _orders(tmp_path, "dml", "qnn"), export.put_in_place, []

    def once(out: Path) -> None:
        calls.append(out)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(out)

    monkeypatch.setattr(export, "put_in_place", once)
    with pytest.raises(KeyboardInterrupt):
        export_bundles(orders, open_checkpoint(tiny_r1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dml", "qnn.partial"]
    before, name = _files(tmp_path / "dml"), "transformer.onnx.data"
    assert os.path.samefile(tmp_path / "dml" / name, tmp_path / "qnn.partial" / name)
    plans = export.plan_exports(orders, open_checkpoint(tiny_r1))
    with pytest.raises(KeyboardInterrupt):
        export.export_planned(plans, _raise_after(5, []), force=True)
    assert _files(tmp_path / "dml") == before and verify_manifest(tmp_path / "dml") == []
    kept: list[str] = []
    for bundle in export.export_planned(plans, note=kept.append):
        assert verify_manifest(bundle) == []
    assert _files(tmp_path / "dml") == before and [str(tmp_path / "dml") in line for line in kept] == [True]


def test_bytes_of_a_shared_file_are_counted_once_when_space_is_checked(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, counted = _orders(tmp_path, "dml", "qnn"), []
    with pytest.raises(KeyboardInterrupt):
        export_bundles(orders, open_checkpoint(tiny_r1), progress=_raise_after(48, []))
    monkeypatch.setattr(export, "check_machine", lambda plans, already: counted.append(already))
    export_bundles(orders, open_checkpoint(tiny_r1))
    layouts = [plan.plan_export(o.recipe, open_checkpoint(tiny_r1), o.out, "int4").layout for o in orders]
    # Blocks of the file system round up.
    assert 0 < counted[0] <= layouts[0].nbytes + (1 << 16)


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        (("tiny-r1-cpu", "1.5b-cpu"), "one export reads one checkpoint"),
        (("tiny-r1-dml", "tiny-r1-dml"), "a recipe is named twice"),
    ],
)
def test_recipes_that_do_not_go_together_are_refused(recipes: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = called("export", *recipes, "--out", str(tmp_path), "--no-validate")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_bundle_leaves_a_finished_one_it_shares_with_alone(tiny_r1: Path, tmp_path: Path) -> None:
    orders, checkpoint = _orders(tmp_path, "dml", "qnn"), open_checkpoint(tiny_r1)
    with pytest.raises(KeyboardInterrupt):
        export_bundles(orders, checkpoint, progress=_raise_after(20, []))
    (dml,) = export_bundles(orders[:1], checkpoint)
    data = dml / "transformer.onnx.data"
    assert not os.path.samefile(data, tmp_path / "qnn.partial" / data.name)
    # As a kill between the renames of two finished bundles leaves it.
    (tmp_path / "qnn.partial" / data.name).unlink()
    os.link(data, tmp_path / "qnn.partial" / data.name)
    inode, changed = data.stat().st_ino, data.stat().st_mtime_ns
    (qnn,) = export_bundles(orders[1:], checkpoint)
    assert (data.stat().st_ino, data.stat().st_mtime_ns) == (inode, changed)
    assert not os.path.samefile(data, qnn / data.name)
    assert data.read_bytes() == (qnn / data.name).read_bytes()
    assert not verify_manifest(dml) and not verify_manifest(qnn)


def test_what_stops_the_second_bundle_leaves_the_pass_over_the_weights_done(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, write_report, seen = _orders(tmp_path, "dml", "qnn"), export.write_report, list[str]()

    def full(folder: Path, *rest: Any) -> None:
        if folder.name.startswith("qnn"):
            raise OSError(28, "No space left on device", str(folder))
        write_report(folder, *rest)

    monkeypatch.setattr(export, "write_report", full)
    with pytest.raises(MachineError, match=r"qnn\.partial cannot be written: No space left on device"):
        export_bundles(orders, open_checkpoint(tiny_r1))
    monkeypatch.undo()
    for bundle in export_bundles(orders, open_checkpoint(tiny_r1), progress=seen.append):
        assert not verify_manifest(bundle)
    assert seen == []
