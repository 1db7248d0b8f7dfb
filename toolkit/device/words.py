"""The words that name a device, as `--device` takes them."""

from __future__ import annotations

from typing import Final

CPU: Final = "cpu"
TORCH: Final = "torch"
# An index may follow, as in `cuda:1`.
GPUS: Final = ("cuda", "mps", "xpu")
AUTO: Final = "auto"
DEVICES: Final = (CPU, TORCH, *GPUS, AUTO)
