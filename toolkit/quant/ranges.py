"""uint16 activations: one scale and one zero point for a tensor, from the range it was seen in.

QuantizeLinear and DequantizeLinear of the default domain (opset 21), as the Hexagon NPU computes between its linears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import device_of

# What the text did not show: values a quarter beyond the range still fit, for a third of a bit.
HEADROOM: Final = 1.25
_LEVELS: Final = 65535


@dataclass(frozen=True)
class ActivationRange:
    """Where the values of one tensor lie. `low` is not above 0 and `high` not below, so that zero is exact."""

    low: float
    high: float


def uint16_parameters(values: ActivationRange) -> tuple[np.float16, np.uint16]:
    """(scale, zero point). The scale is the least that float16 holds for the range."""
    low, high = HEADROOM * min(values.low, 0.0), HEADROOM * max(values.high, 0.0)
    exact = max((high - low) / _LEVELS, float(np.finfo(np.float16).smallest_subnormal))
    scale = np.float16(exact)
    if float(scale) < exact:
        scale = np.nextafter(scale, np.float16(np.inf))
    return scale, np.uint16(round(-low / float(scale)))


def rounded_to_uint16(x: NDArray[np.float32], values: ActivationRange) -> NDArray[np.float32]:
    """`x` through QuantizeLinear and DequantizeLinear of a tensor in this range: half to even, saturating."""
    on, (scale, zero_point) = device_of(x), (float(part) for part in uint16_parameters(values))
    levels = on.clip(on.rint(x / scale) + zero_point, 0, _LEVELS)
    rounded: NDArray[np.float32] = (levels - zero_point) * scale
    return rounded
