"""The compiled quantizers against their definition, written once more in numpy."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from toolkit.algorithms import DATA_FREE
from toolkit.quant.blockwise import QuantSpec, dequantize_blocks, quantize_blocks

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Four more than a multiple of every block size, and for 16 and 128 an odd number of blocks.
WIDTH = 516
KINDS = ("gaussian", "student-t", "positive", "zero blocks", "outlier", "constant")
SPECS = [QuantSpec(bits, block, sym) for bits, block, sym in product((4, 8), (16, 32, 128), (False, True))]
# What float32 sums of 128 products may be wrong by, as a share of what is summed. Candidates are compared by what they
# take off the weighted square of the block; that is four digits larger than the error where there are 8 bits.
_SUMS = 2e-6
# What a scale fitted from such sums misses, squared: all there is where a block could be stored exactly. A processor
# with fewer lanes adds more terms one after the other, and errs by more.
_SCALES = 1e-10


def _weight(kind: str, rows: int = 48) -> Floats:
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    weight = rng.standard_normal((rows, WIDTH))
    if kind == "student-t":
        weight = rng.standard_t(3, (rows, WIDTH))
    elif kind == "positive":
        weight = np.abs(weight) + 0.1
    elif kind == "zero blocks":
        weight[:, 128:256] = 0
        weight[7] = 0
        weight[8, -4:] = 0
    elif kind == "outlier":
        weight *= 1e-3
        weight[:, 5::128] = rng.choice([-3.0, 3.0], (rows, 1))
    elif kind == "constant":
        weight[:] = rng.standard_normal((rows, 1))
    return weight.astype(np.float32)


def _in_blocks(weight: Floats, block_size: int) -> Floats:
    """[N, J, block_size], the last block of a row filled up with zeros."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block_size)))
    return padded.reshape(len(weight), -1, block_size)


def _inverse(scale: Floats) -> Floats:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _zero(low: Floats, scale: Floats, spec: QuantSpec) -> Floats:
    return np.clip(np.rint(-low * _inverse(scale)), 0, 2**spec.bits - 1).astype(np.float32)


def _range(blocks: Floats, spec: QuantSpec) -> tuple[Floats, Floats]:
    """Scale and zero of rounding to nearest, [N, J]: the range of a block and 0."""
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    if spec.symmetric:
        half = np.float32(2 ** (spec.bits - 1))
        scale = np.where(-low > high, low, high) / -half
        return scale, np.full_like(scale, half)
    scale = (high - low) / np.float32(2**spec.bits - 1)
    return scale, _zero(low, scale, spec)


def _levels(blocks: Floats, scale: Floats, zero: Floats, spec: QuantSpec) -> Floats:
    """Integers 0 … 2^bits - 1, half to even."""
    around_zero = np.rint(blocks * _inverse(scale)[..., None])
    return np.clip(around_zero + zero[..., None], 0, 2**spec.bits - 1)


def _nibbles(values: Floats, bits: int) -> NDArray[np.uint8]:
    """The last axis as bytes: for 4 bits two values each, the even one low."""
    whole = values.astype(np.uint8)
    if bits == 8:
        return whole
    even, odd = whole[..., ::2], np.zeros_like(whole[..., ::2])
    odd[..., : whole.shape[-1] // 2] = whole[..., 1::2]
    return even + 16 * odd


def _importance(blocks: Floats) -> Doubles:
    """w = rms(block) + |x|."""
    wide = blocks.astype(np.float64)
    return np.sqrt((wide * wide).mean(-1, keepdims=True)) + np.abs(wide)


def _best_of_candidates(blocks: Floats, spec: QuantSpec) -> Doubles:
    """The smallest weighted error of seven ranges, [N, J], each with its integers kept and its scale refitted.

    Integers and zero points are float32's, so that no tie falls otherwise; sums are float64's.
    """
    start, start_zero = _range(blocks, spec)
    steps = np.float32(2 ** (spec.bits - 1) if spec.symmetric else 2**spec.bits - 1)
    low = np.minimum(blocks.min(-1), 0)
    wide, weights = blocks.astype(np.float64), _importance(blocks)
    errors = []
    for tenths in range(-9, 10, 3):
        candidate = start * (steps / (steps + np.float32(tenths) / np.float32(10)))
        zero = start_zero if spec.symmetric else _zero(low, candidate, spec)
        level = _levels(blocks, candidate, zero, spec).astype(np.float64) - zero[..., None]
        cross, square = (weights * wide * level).sum(-1), (weights * level * level).sum(-1)
        scale = np.divide(cross, square, out=np.zeros_like(cross), where=square != 0)
        errors.append((weights * (wide - scale[..., None] * level) ** 2).sum(-1))
    return np.min(errors, axis=0)


def _weighted_error(weight: Floats, spec: QuantSpec) -> Doubles:
    """Of quantize_blocks, [N, J]."""
    restored = dequantize_blocks(quantize_blocks(weight, spec), spec, weight.shape[1])
    blocks, missed = _in_blocks(weight, spec.block_size), _in_blocks(restored - weight, spec.block_size)
    return (_importance(blocks) * missed.astype(np.float64) ** 2).sum(-1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rtn_is_its_definition_bit_for_bit(kind: str, spec: QuantSpec) -> None:
    weight = _weight(kind)
    blocks = _in_blocks(weight, spec.block_size)
    scale, zero = _range(blocks, spec)
    found = quantize_blocks(weight, spec)
    np.testing.assert_array_equal(found.packed, _nibbles(_levels(blocks, scale, zero, spec), spec.bits))
    # The sign of a zero scale means nothing; all others are equal only if their bits are.
    np.testing.assert_array_equal(found.scales, scale)
    assert found.scales.dtype == np.float32
    if spec.symmetric:
        assert found.zero_points is None
    else:
        np.testing.assert_array_equal(found.zero_points, _nibbles(zero, spec.bits))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kquant_takes_the_best_of_its_candidates(kind: str, spec: QuantSpec) -> None:
    weight = _weight(kind)
    blocks = _in_blocks(weight, spec.block_size)
    whole = (_importance(blocks) * blocks.astype(np.float64) ** 2).sum(-1)
    best = _best_of_candidates(blocks, spec)
    plain, searched = (_weighted_error(weight, replace(spec, algorithm=algorithm)) for algorithm in ("rtn", "kquant"))
    assert (searched <= best * (1 + 1e-4) + _SUMS * whole).all()
    assert (searched <= plain * (1 + 1e-6) + (_SCALES if spec.bits == 4 else _SUMS) * whole).all()
    # What single blocks may lose to float32 sums is nothing beside what all of them gain.
    assert searched.sum() <= best.sum() * (1.0002 if spec.bits == 4 else 1.01) + _SCALES * whole.sum()
    assert searched.sum() <= plain.sum() * (1 + 1e-6) + _SCALES * whole.sum()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("algorithm", DATA_FREE)
def test_noise_is_the_squared_distance_to_what_is_restored(algorithm: str, spec: QuantSpec) -> None:
    for kind in KINDS:
        weight = _weight(kind)
        found = quantize_blocks(weight, replace(spec, algorithm=algorithm))
        missed = dequantize_blocks(found, spec, WIDTH).astype(np.float64) - weight
        assert found.noise == pytest.approx(float((missed**2).sum()), rel=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("algorithm", DATA_FREE)
def test_zeros_and_padding_stay_zero(algorithm: str, spec: QuantSpec) -> None:
    for kind in KINDS:
        weight = _weight(kind)
        weight[np.random.default_rng(0).random(weight.shape) < 0.2] = 0
        found = quantize_blocks(weight, replace(spec, algorithm=algorithm))
        restored = dequantize_blocks(found, spec, spec.num_blocks(WIDTH) * spec.block_size)
        assert not restored[:, :WIDTH][weight == 0].any()
        assert not restored[:, WIDTH:].any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_kquant_gains_a_fifth_of_a_decibel(symmetric: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
    plain, searched = (
        quantize_blocks(weight, QuantSpec(4, 32, symmetric, algorithm)) for algorithm in ("rtn", "kquant")
    )
    assert 10 * np.log10(plain.noise / searched.noise) >= 0.2


@pytest.mark.parametrize("algorithm", ["rtn", "kquant"])
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-36, 1e-30, 1e-23, 1e-15])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiny_weights_stay_finite_and_zeros_stay_zero(algorithm: str, size: float, bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, 32, symmetric, algorithm)
    weight = np.array([[-size, 0, size / 2, 0] * 16], np.float32)
    blocks = quantize_blocks(weight, spec)
    values = dequantize_blocks(blocks, spec, 64)
    assert np.isfinite(blocks.noise) and np.isfinite(values).all()
    assert (values[weight == 0] == 0).all()
    if size > 1e-34:
        assert np.abs(values - weight).max() <= size / 7


def test_compiled_and_cached_code_make_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import hashlib, numpy as np; from toolkit.quant.blockwise import *\n"
        "w = np.random.default_rng(0).standard_t(3, (512, 2048)).astype(np.float32)\n"
        "for spec in (QuantSpec(4, 32, False, 'kquant'), QuantSpec(8, 32, True, 'kquant'), QuantSpec(8, 128)):\n"
        "    b = quantize_blocks(w, spec); print(hashlib.sha256(b.packed.tobytes() + b.scales.tobytes()).hexdigest())"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbc"))
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.split()) == 3
