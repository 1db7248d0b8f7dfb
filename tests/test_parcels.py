"""Arrays in files that several processes map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.quant.blockwise import QuantSpec
from toolkit.workers.parcels import get, put


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
