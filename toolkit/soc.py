"""Systems on a chip that a transformer is compiled for: one context binary serves one of them.

PCs with Windows on Arm alone: the bundle's settings name QnnHtp.dll.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Soc:
    """One row. `soc_model` and `htp_arch` are the execution provider's numbers for it; `memory_bytes_per_s` is the
    peak of its memory, the bound of decoding."""

    name: str
    device: str
    soc_model: int
    htp_arch: int
    memory_bytes_per_s: float
    memory_source: str

    @property
    def provider_options(self) -> dict[str, str]:
        """What QNNExecutionProvider has to be told of it."""
        return {"soc_model": str(self.soc_model), "htp_arch": str(self.htp_arch)}


# Each pair of numbers compiles with onnxruntime-qnn 2.7.0, which writes them into the compiled file.
SOCS: Final = {
    soc.name: soc
    for soc in (
        Soc(
            "x-elite",
            "Snapdragon X Elite",
            60,
            73,
            135e9,
            "as Qualcomm publishes it: LPDDR5x-8448 on 128 bits, 135 GB/s",
        ),
        Soc(
            "x2-elite",
            "Snapdragon X2 Elite",
            88,
            81,
            152e9,
            "as the press reports it: LPDDR5x-9523 on 128 bits, 152 GB/s (X2 Elite Extreme: 192 bits, 228 GB/s)",
        ),
    )
}
