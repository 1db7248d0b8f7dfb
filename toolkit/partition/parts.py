"""The transformer in parts of consecutive layers, each compiled by itself: how many, and where they are cut.

A context binary may have 2 GiB, and its compiler takes many times the weights in memory. Both follow from the bytes of
the weights' integers, so the parts are the same on every machine.
"""

from __future__ import annotations

from typing import Final

from toolkit import names
from toolkit.errors import UnsupportedError
from toolkit.graph.layout import Layout

# What a context binary may have, less a margin for what is no weight.
MAX_BINARY_BYTES: Final = (2 << 30) - (64 << 20)
# Measured with onnxruntime-qnn 2.7.0 (LOG.md), of the bytes of int4: the binary has 1.04 times them in blocks of 64 and
# 1.14 in blocks of 16; at 1.5B, 7B and 14B width 11.3 to 13.1 times them are in memory while the second of two graphs
# that share them is compiled, whatever the blocks.
BINARY_SHARE: Final = 1.16
_BASE_MEMORY_BYTES: Final = 250 << 20
_MEMORY_SHARE: Final = 13.5
# What compiling one part may take, unless the recipe asks for fewer parts.
MEMORY_BUDGET_BYTES: Final = 8_000_000_000


def layer_bytes(layout: Layout, num_layers: int) -> list[int]:
    """Returns the bytes of each layer's weights as a compiler has them: integers without their scales, which weigh
    little in a binary and nothing in memory, or floats."""
    sums = [0] * num_layers
    for unit in layout.units.values():
        if (layer := names.layer_of(unit.name)) is not None:
            signed = unit.spec is not None and unit.spec.signed
            sums[layer] += sum(slot.nbytes for slot in (unit.slots[:1] if signed else unit.slots))
    return sums


def cut_layers(layers: list[int], parts: int) -> tuple[range, ...]:
    """Consecutive layers for each of `parts`, about equal in bytes; none is empty if there are layers enough."""
    whole, before, cuts = sum(layers), 0, [0]
    for k, nbytes in enumerate(layers):
        middle = before + nbytes / 2
        part = int(parts * middle / whole)
        must = len(layers) - k == parts - len(cuts)
        if k > cuts[-1] and len(cuts) < parts and (part >= len(cuts) or must):
            cuts.append(k)
        before += nbytes
    return tuple(range(a, b) for a, b in zip(cuts, [*cuts[1:], len(layers)], strict=True))


def compile_memory_bytes(weight_bytes: int) -> int:
    """What compiling a part of so many bytes will take, as a forecast."""
    return int(_BASE_MEMORY_BYTES + _MEMORY_SHARE * weight_bytes)


def plan_parts(layers: list[int]) -> int:
    """The fewest parts that keep binary and compiler within their limits.

    A single layer that is over the memory budget is let through, since the machine may have the memory. Raises
    UnsupportedError for one whose binary would be too large.
    """
    _check_layers(layers)
    fits = max(_most_weight_bytes(), max(layers))
    return next(n for n in range(1, len(layers) + 1) if largest_part(layers, n) <= fits)


def check_parts(layers: list[int], parts: int) -> None:
    """Raises UnsupportedError if so many parts, which the recipe asks for, are more than layers or too large."""
    if parts > len(layers):
        raise UnsupportedError(f"parts is {parts}, and the model has {len(layers)} layers: set as many or fewer")
    _check_layers(layers)
    if (largest := largest_part(layers, parts)) * BINARY_SHARE > MAX_BINARY_BYTES:
        raise UnsupportedError(
            f"parts={parts} leaves a part of {largest / 2**30:.2f} GiB, and a context binary may have 2 GiB: set "
            f"parts={plan_parts(layers)}, or leave parts out"
        )


def _most_weight_bytes() -> int:
    by_memory = (MEMORY_BUDGET_BYTES - _BASE_MEMORY_BYTES) / _MEMORY_SHARE
    return int(min(by_memory, MAX_BINARY_BYTES / BINARY_SHARE))


def largest_part(layers: list[int], parts: int) -> int:
    """The bytes of the largest of so many parts."""
    return max(sum(layers[i] for i in span) for span in cut_layers(layers, parts))


def _check_layers(layers: list[int]) -> None:
    largest = max(range(len(layers)), key=layers.__getitem__)
    if layers[largest] * BINARY_SHARE > MAX_BINARY_BYTES:
        raise UnsupportedError(
            f"layer {largest} has {layers[largest] / 2**30:.2f} GiB of weights, and a context binary, which holds one "
            "layer at least, may have 2 GiB: quantize it to fewer bits"
        )
