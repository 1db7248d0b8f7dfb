"""Packed weights tuned in their data files. What was found is kept first, so that a run that is killed while it writes
ends in the same bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from toolkit.calibrate.tuning import Tuning, tune
from toolkit.device.arrays import NUMPY, Device
from toolkit.device.chosen import chosen_device
from toolkit.device.words import TORCH
from toolkit.files import replacing
from toolkit.partition.data_files import Destination
from toolkit.partition.solved import open_solved
from toolkit.partition.stored import StoredTensors
from toolkit.pipeline.calibration import TokenizedText
from toolkit.pipeline.plan import ExportPlan
from toolkit.quant.blockwise import QuantizedBlocks, QuantSpec, dequantize_blocks
from toolkit.report.weight_sections import Tuned

_FOUND_FILE: Final = "tuned.npz"
_FIGURES: Final = "figures"
_SCALES: Final = "scales "
_GAIN: Final = "gain "


def tuning_device(on: Device) -> Device:
    """The device that tunes, where `on` calibrates: itself if torch computes there, else torch on the CPU.

    Raises MachineError if torch is not installed.
    """
    return chosen_device(TORCH) if on is NUMPY else on


def tune_packed(
    plan: ExportPlan,
    text: TokenizedText,
    partial: Path,
    work: Path,
    progress: Callable[[str], None] = lambda _: None,
    on: Device = NUMPY,
) -> Tuned:
    """Tunes the weights packed in `partial` on the device that `tuning_device` gave, and says what that brought; `work`
    keeps what was found."""
    start = time.perf_counter()
    stored, kept = StoredTensors(plan.layout, partial), work / _FOUND_FILE
    found = _read(kept)
    if found is None:
        config, source, steps = plan.checkpoint.config, plan.checkpoint.source, plan.recipe.tuning_steps
        found = tune(config, source, stored, text.sequences, steps, on, progress)
        _write(found, kept)
    with open_solved(Destination(plan.layout, partial)) as writer:
        for name, scales in found.scales.items():
            blocks, spec = _rescaled(stored, name, scales)
            weight = plan.checkpoint.source.read(name)
            lost = np.square(dequantize_blocks(blocks, spec, weight.shape[1]) - weight).sum(dtype=np.float64)
            writer.write(name, 0, NUMPY.square_sum(weight), replace(blocks, noise=float(lost)))
        for name, gain in found.gains.items():
            writer.write_floats(name, gain)
        writer.commit()
    seconds = time.perf_counter() - start
    return Tuned(plan.recipe.tuning_steps, found.tokens, found.kld_before, found.kld_after, seconds)


def _rescaled(stored: StoredTensors, name: str, scales: NDArray[np.float32]) -> tuple[QuantizedBlocks, QuantSpec]:
    """A matrix as it is stored, with other scales."""
    found = stored.blocks(name)
    assert found is not None
    blocks, spec = found
    return replace(blocks, packed=np.ascontiguousarray(blocks.packed), scales=scales), spec


def _write(found: Tuning, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {_SCALES + name: scales for name, scales in found.scales.items()}
    arrays |= {_GAIN + name: gain for name, gain in found.gains.items()}
    figures = np.array([found.tokens, found.kld_before, found.kld_after])
    with replacing(path) as fresh, fresh.open("wb") as file:
        np.savez(file, allow_pickle=False, **{_FIGURES: figures, **arrays})


def _read(path: Path) -> Tuning | None:
    """What an earlier run found; None if there is none, or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tokens, before, after = arrays[_FIGURES]
            scales = {n.removeprefix(_SCALES): arrays[n] for n in arrays.files if n.startswith(_SCALES)}
            gains = {n.removeprefix(_GAIN): arrays[n] for n in arrays.files if n.startswith(_GAIN)}
            return Tuning(int(tokens), float(before), float(after), scales, gains)
    except (OSError, ValueError, KeyError, BadZipFile):
        return None
