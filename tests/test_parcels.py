"""Arrays in files that several processes map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.quant.blockwise import QuantSpec
from toolkit.workers.parcels import get, put, take


def test_a_parcel_has_what_was_put(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays: list[NDArray[Any]] = [
        generator.standard_normal((3, 7)).astype(np.float32),
        np.zeros((0, 4), np.uint8),
        np.arange(5),
    ]
    arrays.append(np.asfortranarray(generator.standard_normal((4, 6))))
    arrays.append(arrays[0][:, ::2])
    spec = QuantSpec(bits=4, block_size=32, symmetric=True, algorithm="rtn")
    found_spec, found = get(put(tmp_path, (spec, arrays)))
    assert found_spec == spec
    for one, other in zip(found, arrays, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_what_is_written_to_an_array_stays_in_its_process(tmp_path: Path) -> None:
    path = put(tmp_path, np.ones(1000, np.float32))
    mine, theirs = get(path), get(path)
    mine += 1
    assert mine.sum() == 2000 and theirs.sum() == 1000 == get(path).sum()
    assert mine.ctypes.data % 64 == 0


def test_what_was_taken_is_sent_on_by_its_name(tmp_path: Path) -> None:
    """A tenth of the bytes: what lies elsewhere, or not at a vector's place, is written."""
    whole = np.arange(100_000, dtype=np.float32)
    taken = take(put(tmp_path, [whole, np.asfortranarray(whole.reshape(100, 1000))]))
    own = np.arange(10, dtype=np.float32)
    sent = put(
        tmp_path, {"first": taken[0], "turned": taken[1], "some": taken[0][16:32], "odd": taken[0][1:9], "own": own}
    )
    assert Path(sent).stat().st_size < 4096
    found = get(sent)
    np.testing.assert_array_equal(found["first"], whole)
    np.testing.assert_array_equal(found["turned"], whole.reshape(100, 1000))
    np.testing.assert_array_equal(found["some"], whole[16:32])
    np.testing.assert_array_equal(found["odd"], whole[1:9])
    np.testing.assert_array_equal(found["own"], own)
    found["first"] += 1
    assert taken[0][0] == 0, "what is written there stays there"


def test_what_was_taken_goes_with_its_last_array(tmp_path: Path) -> None:
    path = Path(put(tmp_path, [np.ones(1000), np.ones(1000)]))
    first, second = take(str(path))
    del first
    view = second[10:20]
    del second
    assert path.is_file()
    del view
    assert not path.is_file()
