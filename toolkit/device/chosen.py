"""Which device a word of `--device` means on this machine, and which is the best there is."""

from __future__ import annotations

from typing import Final

from toolkit.device.arrays import NUMPY, Device
from toolkit.device.words import AUTO, CPU, DEVICES, GPUS, TORCH
from toolkit.errors import MachineError, RecipeError

_INSTALL: Final = "pip install 'onnx-distill-toolkit[torch]'"


def chosen_device(word: str) -> Device:
    """The device that a word means: `cpu` is numpy, `torch` torch on the CPU, `auto` the first GPU that torch has here,
    or numpy where there is none.

    Raises RecipeError for a word that means nothing, MachineError if torch or the device is not there.
    """
    kind, colon, index = word.partition(":")
    if kind not in DEVICES or (colon and (kind not in GPUS or not index.isdecimal())):
        raise RecipeError(f"device {word!r} means nothing: known are {', '.join(DEVICES)}, and cuda:1 and the like")
    if kind == CPU:
        return NUMPY
    try:
        from toolkit.device.torch_arrays import gpus_here, torch_device
    except ImportError:
        if kind == AUTO:
            return NUMPY
        raise MachineError(f"device {word!r} needs torch, which is not installed: {_INSTALL}") from None
    if kind == TORCH:
        return torch_device("cpu")
    here = gpus_here(GPUS)
    if kind == AUTO:
        return torch_device(next(iter(here))) if here else NUMPY
    if int(index or 0) >= here.get(kind, 0):
        there = ", ".join(f"{count} of {name}" for name, count in here.items()) or "none"
        raise MachineError(f"device {word!r} is not here: torch sees {there}; take another --device, or auto")
    return torch_device(word)
